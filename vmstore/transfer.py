"""Import and export: between an image and a file in one of the formats that qemu-img knows.

qemu-img reads and writes the formats; the image is reached over NBD like any guest's disk. Holes
stay holes both ways. Nothing half done remains: an import that fails takes its image away again, an
export appears under its name only when it is whole and on stable storage.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from shard.errors import HciError
from vmstore.interrupts import undisturbed

FORMATS = ("qcow2", "raw", "vmdk", "vdi")

SUFFIXES = {".qcow2": "qcow2", ".raw": "raw", ".img": "raw", ".vmdk": "vmdk", ".vdi": "vdi"}

SECTOR_BYTES = 512

QEMU_IMG_FOUND_CORRUPTION = 2
"""Exit status of `qemu-img check` (qemu-img(1)); leaked space has another and loses nothing."""

LEAVING_S = 5.0
"""How long a program that is told to end may take, before it is made to."""

Progress = Callable[[float], None]
"""Told now and then which part of the work is done, from 0 to 1."""

_PERCENT = re.compile(rb"\(\s*([0-9.]+)/100%\)")

_SERVER_SAID = "server reported: "
"""How QEMU begins the line with an NBD server's own reason, which it prints below its complaint."""


class TransferFailed(HciError):
    """An import or export was not done and nothing of it remains; correct the cause, try again."""


@dataclass(frozen=True)
class Source:
    """A file to import, as qemu-img sees it. `size_bytes` is padded to whole sectors."""

    path: Path
    format: str
    size_bytes: int


def nbd_uri(name: str, socket: Path) -> str:
    """Return the NBD URI of an image at a gateway's unix socket (the NBD URI specification)."""
    return f"nbd+unix:///{quote(name)}?socket={quote(str(socket))}"


def inspect(path: Path, file_format: str | None = None) -> Source:
    """Return what there is to import in a file.

    Without `file_format` the file's first bytes decide. Raises TransferFailed where the file is
    missing, unreadable, cut short, of a format that is not taken, or empty.
    """
    path = _absolute(path)
    try:
        # Without a writer the open of a pipe would wait for one.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise TransferFailed(f"{path} cannot be read: {error.strerror}") from error
    os.close(descriptor)
    if path.is_dir() or path.is_fifo():
        what = "folder" if path.is_dir() else "pipe"
        raise TransferFailed(f"{path} is a {what}; name a file, which is read more than once")
    given = ["-f", _checked(file_format)] if file_format else []
    found = json.loads(_answer("info", "--output=json", *given, str(path)))
    if found["format"] not in FORMATS:
        raise TransferFailed(
            f"{path} is of format {found['format']}; an import takes {', '.join(FORMATS)}"
        )
    size_bytes = -(-int(found["virtual-size"]) // SECTOR_BYTES) * SECTOR_BYTES
    if size_bytes == 0:
        raise TransferFailed(f"{path} is empty; there is nothing to import")
    source = Source(path, found["format"], size_bytes)
    _refuse_truncated(source, found.get("format-specific", {}).get("data", {}))
    return source


def touch(uri: str, name: str) -> None:
    """Open the image at `uri` and close it again. Raises TransferFailed where it does not open."""
    try:
        _answer("info", "--output=json", "-f", "raw", uri)
    except TransferFailed as error:
        raise TransferFailed(f"{name} does not open: {error}") from error


@contextmanager
def held_open(uri: str) -> Iterator[Callable[[], bool]]:
    """Have the image at `uri` open for the block; what is given says whether it still is.

    It is a moment after the block begins. Raises TransferFailed where the program is missing.
    """
    with undisturbed():
        process = subprocess.Popen(
            [_program("qemu-io"), "-r", "-f", "raw", uri],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    assert process.stdin is not None
    try:
        yield lambda: process.poll() is None
    finally:
        # It leaves in good order when it is told nothing more.
        with suppress(OSError, subprocess.TimeoutExpired):
            process.stdin.close()
            process.wait(LEAVING_S)
        _end(process)


def fill(source: Source, uri: str, progress: Progress) -> None:
    """Copy a file into the new image at `uri`, which must read as zeroes; flush it there.

    Raises TransferFailed; the image is then partly written.
    """
    options = ("-n", "--target-is-zero", "-W", "-t", "writeback", "-f", source.format, "-O", "raw")
    _convert([*options, str(source.path), uri], progress, f"importing {source.path}")


def export(
    uri: str, path: Path, progress: Progress, file_format: str | None = None, *, force: bool = False
) -> None:
    """Copy the image at `uri` into a file, which replaces one there only with `force`.

    Without `file_format` the file's suffix decides, and raw where it says nothing. Raises
    TransferFailed.
    """
    path = _absolute(path)
    kind = _checked(file_format or SUFFIXES.get(path.suffix.lower(), "raw"))
    if path.is_dir():
        raise TransferFailed(f"{path} is a folder; name a file")
    _refuse_special(path)
    if path.exists() and not force:
        raise TransferFailed(f"{path} exists; remove it, or give --force to replace it")
    shortened = os.fsdecode(os.fsencode(path.name)[:200])
    part = path.with_name(f".{shortened}.{os.getpid()}.part")
    try:
        _convert(
            ["-t", "writeback", "-f", "raw", "-O", kind, uri, str(part)],
            progress,
            f"exporting to {path}",
        )
        _put_in_place(part, path)
    finally:
        part.unlink(missing_ok=True)


def _refuse_special(path: Path) -> None:
    """An export takes the place of what is there, so a device would be gone, not written."""
    if path.exists() and not path.is_file():
        raise TransferFailed(
            f"{path} is a device, a pipe or a socket, and an export makes a file: name a file, "
            "or write to a device with `qemu-img convert` from the address that "
            "`hci image url` prints"
        )


def _put_in_place(part: Path, path: Path) -> None:
    _refuse_special(path)
    try:
        _sync(part)
        part.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise TransferFailed(f"{path} cannot be written: {error.strerror}") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _absolute(path: Path) -> Path:
    """Before its first slash qemu-img takes a colon for the end of a protocol's name."""
    return path.absolute()


def _checked(file_format: str) -> str:
    if file_format not in FORMATS:
        raise TransferFailed(f"{file_format!r} is not a format; use {', '.join(FORMATS)}")
    return file_format


def _refuse_truncated(source: Source, details: Mapping[str, Any]) -> None:
    """qemu reads what lies past a file's end as zeroes, so a short copy would import silently.

    Every piece of data that the format's own map places in a file must lie within that file.
    """
    if source.format == "raw" or not source.path.is_file():
        return
    extents = json.loads(_answer("map", "--output=json", "-f", source.format, str(source.path)))
    files = _data_files(source, details)
    for extent in extents:
        file, file_bytes = files[bisect_right(files, extent["start"], key=_begin) - 1][1:]
        if _ends_after(extent, file_bytes):
            raise TransferFailed(f"{file} is cut short: it lacks data that it should have")
    if source.format == "qcow2" and _check_status(source) == QEMU_IMG_FOUND_CORRUPTION:
        raise TransferFailed(f"{source.path} is damaged or cut short; `qemu-img check` says where")


def _data_files(source: Source, details: Mapping[str, Any]) -> list[tuple[int, Path, int]]:
    """Return the files with the disk's data, in order: where each begins in the disk, and its size.

    A vmdk may consist of several, and a qcow2 may have its data in another one.
    """
    folder, begin, files = source.path.parent, 0, []
    for part in details.get("extents", []):
        files.append((begin, folder / part["filename"]))
        begin += int(part["virtual-size"])
    if not files:
        # QEMU takes a relative name from the folder that it was started in.
        files = [(0, Path(details.get("data-file", source.path)))]
    return [(begin, path, _bytes_in(path)) for begin, path in files]


def _bytes_in(path: Path) -> int:
    """Return a file's size; what is no file, such as a device, is not cut short."""
    return path.stat().st_size if path.is_file() else sys.maxsize


def _begin(file: tuple[int, Path, int]) -> int:
    return file[0]


def _check_status(source: Source) -> int:
    """The map does not place compressed data, so qcow2's own check looks after it."""
    command = [_program(), "check", "-q", "-f", source.format, str(source.path)]
    return subprocess.run(command, capture_output=True, check=False).returncode


def _ends_after(extent: dict[str, Any], file_bytes: int) -> bool:
    if extent["depth"] != 0 or not extent["data"] or "offset" not in extent:
        return False
    # The last sector of a file may be written in part.
    return int(extent["offset"]) + int(extent["length"]) > file_bytes + SECTOR_BYTES - 1


def _program(name: str = "qemu-img") -> str:
    program = shutil.which(name)
    if program is None:
        raise TransferFailed(f"there is no `{name}` program here; install qemu-utils")
    return program


def _answer(*arguments: str) -> bytes:
    done = subprocess.run([_program(), *arguments], capture_output=True, check=False)
    if done.returncode != 0:
        raise TransferFailed(_complaint(done.stderr))
    return done.stdout


def _convert(arguments: Sequence[str], progress: Progress, what: str) -> None:
    process: subprocess.Popen[bytes] | None = None
    try:
        # Interrupted between its start and our knowing of it, it would go on without us.
        with undisturbed():
            process = subprocess.Popen(
                [_program(), "convert", "-p", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        assert process.stdout is not None
        assert process.stderr is not None
        _follow(process.stdout.fileno(), progress)
        complaint = process.stderr.read()
        status = process.wait()
    finally:
        if process is not None:
            _end(process)
    if status != 0:
        raise TransferFailed(f"{what}: {_complaint(complaint)}")
    progress(1.0)


def _follow(descriptor: int, progress: Progress) -> None:
    """Report the percentages that `-p` prints until the output ends.

    What it says on stderr fits into a pipe, so that is read when it has ended.
    """
    while piece := os.read(descriptor, 4096):
        if found := _PERCENT.findall(piece):
            with suppress(ValueError):
                progress(min(float(found[-1]) / 100, 1.0))


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End it, where it has not ended by itself, and close its pipes."""
    with undisturbed(), process:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()


def _complaint(stderr: bytes) -> str:
    """Return why qemu-img failed: what the gateway said, else what it said first itself."""
    lines = stderr.decode("utf-8", "replace").strip().splitlines()
    said = next((line for line in lines if line.startswith(_SERVER_SAID)), None)
    if said is not None:
        return said.removeprefix(_SERVER_SAID)
    return lines[0].removeprefix("qemu-img: ") if lines else "qemu-img failed without a word"
