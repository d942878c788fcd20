"""qemu-io: single requests of every shape, read back and compared.

Covers unaligned reads and writes down to one byte, FUA, zeroes with and without unmap, discard,
overlapping writes, vectored requests, the largest request, and requests past the end.
"""

from collections.abc import Callable

import pytest

from tests.protocol.newer_peers import WITH_NEWER

GIB = 1 << 30

pytestmark = WITH_NEWER

Run = Callable[..., str]
QemuIo = Callable[..., str]


@pytest.fixture
def qemu_io(run: Run, nbd_uri: str) -> QemuIo:
    """Runs qemu-io commands on the export, in one connection."""

    def run_commands(*commands: str, fails: bool = False) -> str:
        arguments = [word for command in commands for word in ("-c", command)]
        return run("qemu-io", "-f", "raw", *arguments, nbd_uri, fails=fails)

    return run_commands


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 1), (1, 1), (4095, 2), (511, 514), (4097, 4094), (123_457, 1_000_003), (GIB - 1, 1)],
)
def test_qemu_io_unaligned_write_changes_only_its_bytes(
    qemu_io: QemuIo, offset: int, length: int
) -> None:
    before = min(offset, 8192)
    after = min(GIB - offset - length, 8192)
    around = (offset - before, before + length + after)
    checks = [f"read -P 0x22 {offset} {length}"]
    if before:
        checks.append(f"read -P 0x11 {offset - before} {before}")
    if after:
        checks.append(f"read -P 0x11 {offset + length} {after}")
    qemu_io(f"write -P 0x11 {around[0]} {around[1]}", f"write -P 0x22 {offset} {length}", *checks)
    qemu_io(*checks)


def test_qemu_io_write_with_fua_is_read_back(qemu_io: QemuIo) -> None:
    qemu_io("write -f -P 0x33 1M 1M", "write -f -P 0x34 1M 513", "read -P 0x34 1M 513")
    qemu_io("read -P 0x34 1M 513", f"read -P 0x33 {(1 << 20) + 513} {(1 << 20) - 513}")


@pytest.mark.parametrize("flags", ["-z", "-z -u", "-z -f", "-z -u -f", "-z -n"])
def test_qemu_io_zeroes_of_any_kind_read_as_zeroes(qemu_io: QemuIo, flags: str) -> None:
    qemu_io("write -P 0x44 8M 8M", f"write {flags} 9M 4M", "read -P 0 9M 4M", "read -P 0x44 8M 1M")
    qemu_io("read -P 0 9M 4M", "read -P 0x44 13M 3M")


def test_qemu_io_unaligned_zeroes_keep_their_neighbours(qemu_io: QemuIo) -> None:
    qemu_io("write -P 0x45 16M 64k", "write -z 16777300 5001")
    qemu_io("read -P 0x45 16M 84", "read -P 0 16777300 5001", "read -P 0x45 16782301 50000")


def test_qemu_io_discarded_range_can_be_written_again(qemu_io: QemuIo) -> None:
    qemu_io("write -P 0x55 32M 16M", "discard 34M 8M", "write -P 0x56 36M 1M", "flush")
    qemu_io("read -P 0x55 32M 2M", "read -P 0x56 36M 1M", "read -P 0x55 42M 6M")


def test_qemu_io_unaligned_discard_keeps_its_neighbours(qemu_io: QemuIo) -> None:
    qemu_io("write -P 0x57 64M 1M", "discard 67109000 500000")
    qemu_io("read -P 0x57 64M 136", "read -P 0x57 67609000 300000")


def test_qemu_io_largest_request_is_read_back(qemu_io: QemuIo) -> None:
    qemu_io("write -P 0x66 128M 32M", "read -P 0x66 128M 32M")


def test_qemu_io_vectored_requests_are_read_back(qemu_io: QemuIo) -> None:
    qemu_io("writev -P 0x77 200M 4096 512 100000 1", "readv -P 0x77 200M 1 100000 4096 512")


def test_qemu_io_writes_in_flight_together_all_arrive(qemu_io: QemuIo) -> None:
    writes = [f"aio_write -P {i} {300 + i}M 1M" for i in range(1, 30)]
    reads = [f"read -P {i} {300 + i}M 1M" for i in range(1, 30)]
    qemu_io(*writes, "aio_flush", *reads)


@pytest.mark.parametrize("command", ["write -P 1", "write -z", "read", "discard"])
def test_qemu_io_past_the_end_fails_and_the_connection_goes_on(
    qemu_io: QemuIo, command: str
) -> None:
    qemu_io(f"{command} {GIB} 4096", fails=True)
    qemu_io(f"{command} {GIB - 512} 4096", fails=True)
    qemu_io("write -P 0x78 0 4096", "read -P 0x78 0 4096")
