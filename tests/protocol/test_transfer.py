"""Import and export, with nbdkit in the place of a gateway: both speak NBD to the same qemu-img."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.waiting import is_listened_at
from vmstore import transfer
from vmstore.transfer import TransferFailed

MIB = 1 << 20

Reports = list[float]


class Disk:
    """An empty disk behind NBD."""

    def __init__(self, folder: Path, size_bytes: int, slow: Sequence[str] = ()) -> None:
        self.socket = folder / "nbd.sock"
        command = ["nbdkit", "--foreground", "--exit-with-parent", "--unix", str(self.socket)]
        command += ["--filter=delay"] if slow else []
        self._process = subprocess.Popen([*command, "memory", str(size_bytes), *slow])
        while not is_listened_at(self.socket):
            assert self._process.poll() is None, "nbdkit runs"
            time.sleep(0.01)
        self.uri = transfer.nbd_uri("vms/disk", self.socket)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(30)
        self.socket.unlink(missing_ok=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    found = Disk(tmp_path, 64 * MIB)
    yield found
    found.close()


def make(path: Path, file_format: str, size_bytes: int = 64 * MIB) -> Path:
    """A disk with data at both ends and a hole between."""
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", file_format, path, str(size_bytes)], check=True
    )
    writes = ["-c", "write -P 17 0 3M", "-c", f"write -P 34 {size_bytes - MIB} 1M"]
    subprocess.run(
        ["qemu-io", "-f", file_format, *writes, path], check=True, stdout=subprocess.DEVNULL
    )
    return path


def same(first: str, first_format: str, second: str, second_format: str) -> bool:
    command = ["qemu-img", "compare", "-q", "-f", first_format, "-F", second_format, first, second]
    return subprocess.run(command).returncode == 0


@pytest.mark.parametrize("file_format", transfer.FORMATS)
def test_import_and_export_of_each_format_keep_every_byte_and_hole(
    tmp_path: Path, disk: Disk, file_format: str
) -> None:
    original = make(tmp_path / f"original.{file_format}", file_format)
    reports: Reports = []
    source = transfer.inspect(original)
    assert (source.format, source.size_bytes) == (file_format, 64 * MIB)
    transfer.fill(source, disk.uri, reports.append)
    assert reports[-1] == 1.0
    assert reports == sorted(reports)
    assert same(disk.uri, "raw", str(original), file_format)

    copy = tmp_path / f"copy.{file_format}"
    transfer.export(disk.uri, copy, reports.append)
    assert same(str(copy), file_format, str(original), file_format)
    assert copy.stat().st_blocks * 512 < 8 * MIB, "the hole takes no space"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        copy.name,
        "nbd.sock",
        original.name,
    ]


def test_import_of_a_size_that_is_no_multiple_of_512_is_padded(tmp_path: Path) -> None:
    odd = tmp_path / "odd.img"
    odd.write_bytes(b"x" * 1000)
    assert transfer.inspect(odd).size_bytes == 1024


def test_import_of_a_name_with_a_colon_is_no_protocol(tmp_path: Path) -> None:
    odd = make(tmp_path / "nbd:disk.qcow2", "qcow2")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert transfer.inspect(Path(odd.name)).path == odd


@pytest.mark.parametrize("file_format", ["qcow2", "vmdk", "vdi"])
def test_import_of_a_file_that_is_cut_short_is_refused(tmp_path: Path, file_format: str) -> None:
    short = make(tmp_path / f"short.{file_format}", file_format)
    os.truncate(short, short.stat().st_size - MIB)
    with pytest.raises(TransferFailed, match=r"short\.\w+ is (cut short|damaged)"):
        transfer.inspect(short)


def test_import_of_a_compressed_file_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    random = tmp_path / "random.raw"
    random.write_bytes(os.urandom(MIB) * 8)
    short = tmp_path / "short.qcow2"
    subprocess.run(["qemu-img", "convert", "-c", "-O", "qcow2", random, short], check=True)
    os.truncate(short, short.stat().st_size // 2)
    with pytest.raises(TransferFailed, match="cut short"):
        transfer.inspect(short)


def in_two_files(tmp_path: Path, kind: str) -> tuple[Path, Path]:
    """A disk whose data is in another file than the one that names it."""
    raw, disk = make(tmp_path / "raw.img", "raw"), tmp_path / f"disk.{kind}"
    if kind == "qcow2":
        data = tmp_path / "disk.data"
        options = f"data_file={data},data_file_raw=on"
    else:
        options, data = "subformat=monolithicFlat", tmp_path / "disk-flat.vmdk"
    subprocess.run(
        ["qemu-img", "convert", "-O", kind, "-o", options, raw.name, disk.name],
        check=True,
        cwd=tmp_path,
    )
    return disk, data


@pytest.mark.parametrize("kind", ["qcow2", "vmdk"])
def test_import_of_a_disk_in_two_files_looks_for_the_end_of_the_right_one(
    tmp_path: Path, kind: str
) -> None:
    # A whole disk was refused as cut short: the file that names the other one is small.
    disk, data = in_two_files(tmp_path, kind)
    assert transfer.inspect(disk).size_bytes == 64 * MIB
    os.truncate(data, 63 * MIB)
    with pytest.raises(TransferFailed, match=rf"{data.name} is cut short"):
        transfer.inspect(disk)


def test_export_to_the_longest_name_that_a_folder_takes_is_made(tmp_path: Path, disk: Disk) -> None:
    # The name that it has until it is whole was longer.
    path = tmp_path / ("\u65e5" * 83 + ".raw")
    transfer.export(disk.uri, path, lambda _done: None)
    assert path.stat().st_size == 64 * MIB


def test_import_of_what_is_not_there_or_empty_or_foreign_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TransferFailed, match="none.img cannot be read: No such file"):
        transfer.inspect(tmp_path / "none.img")
    (tmp_path / "empty.img").touch()
    with pytest.raises(TransferFailed, match="empty.img is empty"):
        transfer.inspect(tmp_path / "empty.img")
    with pytest.raises(TransferFailed, match="is a folder"):
        transfer.inspect(tmp_path)
    os.mkfifo(tmp_path / "pipe.img")
    with pytest.raises(TransferFailed, match="is a pipe"):
        transfer.inspect(tmp_path / "pipe.img")
    foreign = make(tmp_path / "foreign.vpc", "vpc")
    with pytest.raises(TransferFailed, match="is of format vpc; an import takes qcow2, raw"):
        transfer.inspect(foreign)
    with pytest.raises(TransferFailed, match="'zip' is not a format"):
        transfer.inspect(foreign, "zip")


def test_import_into_what_does_not_answer_says_so_in_one_line(tmp_path: Path) -> None:
    source = transfer.inspect(make(tmp_path / "original.raw", "raw"))
    with pytest.raises(TransferFailed, match="Failed to connect") as caught:
        transfer.fill(source, transfer.nbd_uri("vms/a", tmp_path / "none.sock"), lambda _: None)
    assert "\n" not in str(caught.value)


def test_export_leaves_a_file_that_is_there_alone_unless_forced(tmp_path: Path, disk: Disk) -> None:
    there = tmp_path / "there.img"
    there.write_text("precious")
    with pytest.raises(TransferFailed, match="there.img exists; remove it, or give --force"):
        transfer.export(disk.uri, there, lambda _: None)
    assert there.read_text() == "precious"
    transfer.export(disk.uri, there, lambda _: None, force=True)
    assert there.stat().st_size == 64 * MIB


@pytest.mark.parametrize("force", [False, True])
def test_export_onto_what_is_no_file_is_refused_and_leaves_it(tmp_path: Path, force: bool) -> None:
    # With --force the file took the place of a device's node in its folder.
    pipe, listening = tmp_path / "pipe", tmp_path / "listening"
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to(pipe)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(listening))
        for there in (pipe, listening, tmp_path / "link"):
            with pytest.raises(TransferFailed, match="is a device, a pipe or a socket"):
                transfer.export("nbd://none", there, lambda _: None, force=force)
    assert pipe.is_fifo()
    assert listening.is_socket()
    assert len(list(tmp_path.iterdir())) == 3


def test_export_that_fails_leaves_nothing(tmp_path: Path) -> None:
    uri = transfer.nbd_uri("vms/a", tmp_path / "none.sock")
    with pytest.raises(TransferFailed, match="exporting to"):
        transfer.export(uri, tmp_path / "new.img", lambda _: None)
    assert list(tmp_path.iterdir()) == []


def test_export_that_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    slow = Disk(tmp_path, 64 * MIB, slow=["delay-read=1", "delay-extents=1"])
    code = (
        "import pathlib, sys; from vmstore import transfer;"
        "transfer.export(sys.argv[1], pathlib.Path(sys.argv[2]), lambda _: None)"
    )
    try:
        command = [sys.executable, "-c", code, slow.uri, str(tmp_path / "new.img")]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while not list(tmp_path.glob(".new.img.*")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) != 0
        assert [path.name for path in tmp_path.iterdir()] == ["nbd.sock"]
    finally:
        slow.close()


def test_uri_of_an_unusual_name_is_understood_by_its_reader(tmp_path: Path) -> None:
    name, path = "vms/ä b/100%?#&", tmp_path / "a socket?.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        uri = transfer.nbd_uri(name, path)
    shown = subprocess.run(["qemu-img", "info", uri], capture_output=True, text=True)
    assert "Connection refused" in shown.stderr, "the socket's path arrived whole"
    assert uri.startswith("nbd+unix:///vms/%C3%A4%20b/100%25%3F%23%26?socket=/")


def test_import_that_is_interrupted_as_its_tool_starts_ends_the_tool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It went on by itself: the image that it filled was in use, and could not be taken away.
    started: list[subprocess.Popen[bytes]] = []

    class Interrupted(subprocess.Popen[bytes]):
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)
            started.append(self)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    source = transfer.inspect(make(tmp_path / "original.raw", "raw"))
    slow = Disk(tmp_path, 64 * MIB, slow=["delay-write=1"])
    try:
        with monkeypatch.context() as patch:
            patch.setattr(subprocess, "Popen", Interrupted)
            with pytest.raises(KeyboardInterrupt):
                transfer.fill(source, slow.uri, lambda _done: None)
        assert [each.poll() is not None for each in started] == [True]
    finally:
        slow.close()
