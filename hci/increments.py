"""What the command line does with increments: makes them of two snapshots, puts them onto an image.

A file appears under its name only when it is whole. An image is changed only when the whole file
was read, and it holds what the file was made against; where that is interrupted it goes back.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from blake3 import blake3

from etcd.images import Snapshot
from hci import changes, images, snapshots
from hci.config import Config
from hci.errors import ControlError, Refused
from shard.errors import HciError
from shard.ids import ImageId
from vmstore.catalog import Catalog
from vmstore.changes import Changed
from vmstore.errors import InUse, UnknownSnapshot
from vmstore.increments import DATA_BYTES_MAX, Header, Reader, Record, State, Writer
from vmstore.interrupts import undisturbed
from vmstore.names import ImageName, SnapshotName
from vmstore.nbd_client import NbdClient
from vmstore.transfer import Progress, TransferFailed

AGAIN_S = 0.2

LEAVING_S = 3.0
"""How long a gateway may have an image open whose last client has left."""


class WrongBase(HciError):
    """An image does not hold what an increment was made against; nothing was changed."""


def export(
    config: Config,
    records: Catalog,
    older: SnapshotName,
    newer: SnapshotName,
    path: Path,
    progress: Progress,
    *,
    force: bool,
) -> int:
    """Write what was written between two snapshots into a file; return how many bytes of content.

    Raises what `changes.since` does, and TransferFailed where the file cannot be written.
    """
    parts = list(changes.since(config, records, older, newer, lambda _done: None))
    record, base = records.find_snapshot(older)
    target = records.find_snapshot(newer)[1]
    socket = images.gateway_for(config, None).nbd_socket
    digest = _content_digest(socket, older, parts)
    header = Header(str(older.image), record.id, _state(base), _state(target), digest)
    total = sum(part.length_bytes for part in parts if not part.zero)
    written = 0
    with _made_whole(path, force=force) as file, NbdClient(socket, str(newer)) as client:
        out = Writer(file, header)
        for part in parts:
            if part.zero:
                out.add(Record(part.offset_bytes, part.length_bytes, None))
                continue
            for offset, length in _pieces(part):
                out.add(Record(offset, length, client.read(offset, length)))
                written += length
                progress(written / total)
        out.finish()
    return total


def put_onto(
    config: Config, records: Catalog, path: Path, name: ImageName, progress: Progress
) -> SnapshotName:
    """Put an increment onto an image that holds its base; return the snapshot taken of that.

    Raises BadIncrement, WrongBase and InUse, and nothing was changed. Whatever fails later, the
    image has gone back to its base, or the error says that it has not.
    """
    header, parts = _read_through(path)
    base, target = (SnapshotName(name, state.name) for state in (header.base, header.target))
    _check_base(config, records, base, target, header, parts)
    socket = images.gateway_for(config, None).nbd_socket
    try:
        size_bytes = header.target.size_bytes
        if records.find(name).record.size_bytes != size_bytes:
            images.resize(config, records, name, size_bytes, force=True)
        _apply(path, NbdClient(socket, str(name)), progress)
        snapshots.create(config, records, target)
    except BaseException as error:
        with undisturbed():
            _undo(config, records, base, target, error)
        raise
    return target


def _state(snapshot: Snapshot) -> State:
    return State(snapshot.name, snapshot.generation, snapshot.size_bytes)


def _pieces(part: Changed) -> Iterator[tuple[int, int]]:
    end = part.offset_bytes + part.length_bytes
    for offset in range(part.offset_bytes, end, DATA_BYTES_MAX):
        yield offset, min(DATA_BYTES_MAX, end - offset)


def _content_digest(socket: Path, name: SnapshotName, parts: list[Changed]) -> str:
    """Return the digest of what a snapshot holds in these parts, as far as it reaches."""
    digest = blake3()
    with NbdClient(socket, str(name)) as client:
        for part in parts:
            for offset, length in _pieces(part):
                inside = min(length, client.size_bytes - offset)
                if inside > 0:
                    digest.update(client.read(offset, inside))
    return digest.hexdigest()


def _read_through(path: Path) -> tuple[Header, list[Changed]]:
    """Return what a file is of and which parts it has, if all of it is whole."""
    with _opened(path) as file:
        reader = Reader(file, str(path))
        parts = [
            Changed(each.offset_bytes, each.length_bytes, each.content is None)
            for each in reader.records()
        ]
        return reader.header, parts


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise TransferFailed(f"{path} cannot be read: {error.strerror}") from error
    with file:
        yield file


def _check_base(
    config: Config,
    records: Catalog,
    base: SnapshotName,
    target: SnapshotName,
    header: Header,
    parts: list[Changed],
) -> None:
    name = base.image
    try:
        record, snapshot = records.find_snapshot(base)
    except UnknownSnapshot as error:
        raise WrongBase(
            f"{name} has no snapshot {base.name}, which this increment was made against: put "
            "the one before it onto the image, or take that snapshot where it is what it holds"
        ) from error
    if record.snapshot(target.name) is not None:
        raise WrongBase(f"{name} has a snapshot {target.name} already")
    _await_closed(records, name, record.id)
    if snapshot.size_bytes != header.base.size_bytes or record.snapshots[-1] != snapshot:
        raise WrongBase(f"{base} is not the state that this increment was made against")
    if list(changes.since(config, records, base, name, lambda _done: None)):
        raise WrongBase(
            f"{name} was written since {base}: go back first, with `hci snapshot rollback {base}`"
        )
    socket = images.gateway_for(config, None).nbd_socket
    if _content_digest(socket, base, parts) != header.base_digest:
        raise WrongBase(f"{base} holds something else than this increment was made against")


def _await_closed(records: Catalog, name: ImageName, image: ImageId) -> None:
    """Return when nobody has an image open. Raises InUse where somebody stays."""
    deadline_s = time.monotonic() + LEAVING_S
    while (holder := images.holder_of(records, image)) is not None:
        if time.monotonic() > deadline_s:
            raise InUse(str(name), holder)
        time.sleep(AGAIN_S)


def _apply(path: Path, opened: NbdClient, progress: Progress) -> None:
    with _opened(path) as file, opened as client:
        reader = Reader(file, str(path))
        size_bytes = max(reader.header.target.size_bytes, 1)
        for record in reader.records():
            if record.content is None:
                client.zero(record.offset_bytes, record.length_bytes)
            else:
                client.write(record.offset_bytes, record.content)
            progress((record.offset_bytes + record.length_bytes) / size_bytes)
        client.flush()


def _undo(
    config: Config,
    records: Catalog,
    base: SnapshotName,
    target: SnapshotName,
    error: BaseException,
) -> None:
    """Have the image hold its base again, unless the snapshot that was to come is there."""
    with suppress(HciError):
        records.find_snapshot(target)
        return
    try:
        _go_back(config, records, base)
    except (HciError, ControlError) as problem:
        raise TransferFailed(
            f"{str(error) or 'interrupted'}; and {base.image} holds a part of it, as it cannot go "
            f"back now ({problem}): run `hci snapshot rollback {base}`"
        ) from error


def _go_back(config: Config, records: Catalog, base: SnapshotName) -> None:
    """Roll back as soon as our own connection is no longer known to the gateway."""
    deadline_s = time.monotonic() + images.CLOSING_S
    while True:
        try:
            snapshots.roll_back(config, records, base, force=False)
            return
        except Refused:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(AGAIN_S)


@contextmanager
def _made_whole(path: Path, *, force: bool) -> Iterator[BinaryIO]:
    """Give a file that takes its name when the block ends well, durably; else nothing is left."""
    path = path.absolute()
    if path.exists() and not (force and path.is_file()):
        raise TransferFailed(f"{path} exists; remove it, or give --force to replace a file")
    part = path.with_name(f".{os.fsdecode(os.fsencode(path.name)[:200])}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise TransferFailed(f"{path} cannot be written: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)
