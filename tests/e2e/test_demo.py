"""The demo as a person runs it: to its end, on a disk of one's own, and interrupted half-way."""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

DEMO = [sys.executable, "-m", "tests.e2e.demo"]
PROJECT = Path(__file__).resolve().parents[2]
DISK_BYTES = 64 << 20
# What it promises after its set-up. It takes well under a minute on two cores that do nothing else.
WHOLE_S = 180
# Where the boot sector keeps its request to the BIOS, and its load address.
PACKET_AT = 0x80
LOADED_AT = 0x7C00


def boot_sector() -> bytes:
    """A BIOS boot sector that for ever reads 4 KiB and writes it back, each 4 KiB further on."""
    packet = struct.pack("<H", LOADED_AT + PACKET_AT)
    lba = struct.pack("<H", LOADED_AT + PACKET_AT + 8)
    setup = b"\xfa\x31\xc0\x8e\xd8\x8e\xc0\x8e\xd0\xbc\x00\x7c\xfb"  # segments 0, stack below us
    loop = b"\xbe" + packet + b"\xb2\x80\xb4\x42\xcd\x13"  # int 13h, extended read of disk 80h
    loop += b"\xbe" + packet + b"\xb2\x80\xb8\x00\x43\xcd\x13"  # int 13h, extended write
    loop += b"\x83\x06" + lba + b"\x08"  # eight sectors further on
    loop += b"\xeb" + struct.pack("<b", -len(loop) - 2)
    sector = bytearray(512)
    sector[: len(setup) + len(loop)] = setup + loop
    # Size of the packet, sectors, buffer 0000:8000, first sector (EDD-3, 4.2).
    sector[PACKET_AT : PACKET_AT + 16] = struct.pack("<BBHHHQ", 16, 0, 8, 0x8000, 0, 2048)
    sector[510:] = b"\x55\xaa"
    return bytes(sector)


def halting_boot_sector() -> bytes:
    """A BIOS boot sector that does nothing for ever."""
    return (b"\xfa\xf4\xeb\xfd").ljust(510, b"\0") + b"\x55\xaa"  # cli, hlt, back to hlt


def disk(path: Path, sector: bytes) -> Path:
    """A raw disk that begins with this boot sector."""
    with path.open("wb") as file:
        file.write(sector)
        file.truncate(DISK_BYTES)
    return path


def test_demo_runs_to_its_end_and_leaves_nothing_behind(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        DEMO, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=WHOLE_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for shown in (
        "node2 died before file",
        "node2 is stale for vms/guest",
        "QEMU reported no I/O error",
        "files and records hold",
        "Nothing was lost.",
    ):
        assert shown in done.stdout, done.stdout
    assert list(tmp_path.iterdir()) == []
    assert _processes_naming(tmp_path) == []


def test_demo_on_an_own_image_goes_on_after_a_node_is_killed(tmp_path: Path) -> None:
    raw = disk(tmp_path / "own.raw", boot_sector())
    own = tmp_path / "own.qcow2"
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", raw, own], check=True, timeout=60)
    done = subprocess.run(
        [*DEMO, "--image", str(own)], cwd=PROJECT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "went on without an I/O error" in done.stdout
    assert "asks for little" not in done.stdout, "the disk did not boot"
    assert "node2 is stale for vms/guest" in done.stdout


def test_demo_on_an_own_image_that_asks_for_nothing_shows_nothing(tmp_path: Path) -> None:
    # It said that the machine went on without an I/O error, of one that did nothing at all.
    own = disk(tmp_path / "own.raw", halting_boot_sector())
    done = subprocess.run(
        [*DEMO, "--image", str(own), "--patience", "5"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "nothing was shown: it asked nothing of its disk after node2 was killed" in done.stdout
    assert "went on without" not in done.stdout


def test_demo_interrupted_leaves_nothing_behind(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    running = subprocess.Popen(
        DEMO, cwd=PROJECT, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert running.stdout is not None
    for line in running.stdout:
        if "Importing" in line:
            break
    running.send_signal(signal.SIGINT)
    rest, _ = running.communicate(timeout=120)
    assert running.returncode == 130
    assert "Interrupted" in rest
    assert list(tmp_path.iterdir()) == []
    assert _processes_naming(tmp_path) == []


def _processes_naming(directory: Path) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            content = entry.read_bytes()
            if os.fsencode(directory) in content:
                found.append(os.fsdecode(content))
    return found


def test_demo_on_a_missing_file_says_so_before_it_starts_anything(tmp_path: Path) -> None:
    done = subprocess.run(
        [*DEMO, "--image", str(tmp_path / "missing.qcow2")],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "missing.qcow2" in done.stderr
    assert done.stdout == ""
