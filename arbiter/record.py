"""The arbiter's durable record: who it is, and its votes of each image.

    DATA_DIR/lock            held while a process uses the record
    DATA_DIR/arbiter         id, name, cluster, start counter
    DATA_DIR/votes/IMAGE     the votes of one image, and how often they have changed

Each file is two lines: the BLAKE3 digest of the second, and a JSON object. A file is written
beside its place, synced, renamed over the former one, and the directory is synced: what was
answered is there after a power cut, whole, and a file that is not whole was never answered from a
sound disk. It is refused, for that image alone. A write or sync that failed is not tried again: it
ends the record, since nobody knows what the disk holds.

The id is drawn when the directory is empty. The start counter is raised before anything is
answered. Each image's count of changes is told to who asks, and kept in etcd and on the nodes with
the image's own record; so a disk that was emptied or put back to an older state is found out.
"""

import fcntl
import json
import os
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from arbiter.errors import ArbiterFailed, ForeignRecord, RecordBusy, RecordDamaged
from arbiter.statement import Votes
from arbiter.vote import Ballot, Vote, check
from shard.digest import digest
from shard.errors import HciError
from shard.ids import ImageId, holder_id, image_id

VERSION = 1

FILE_BYTES_MAX = 1 << 20
"""The votes of an image with the most replica sets there can be take a third of this."""

_NEW = ".new"


@dataclass(frozen=True, slots=True)
class Identity:
    """Which arbiter this is. `start_counter` tells its runs apart."""

    id: str
    name: str
    cluster: str
    start_counter: int


@dataclass(frozen=True, slots=True)
class ImageVotes:
    """The votes of an image; `changes` counts their changes, 0 where it is not known here."""

    changes: int = 0
    votes: Votes = ()


class Record:
    """The record in one data directory. Safe to use from several threads, not twice per image.

    `sync` makes a file or directory durable, `new_id` names a new record; tests replace both.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        name: str,
        cluster: str,
        sync: Callable[[int], None] = os.fsync,
        new_id: Callable[[], str] = lambda: secrets.token_hex(16),
    ) -> None:
        """Open the record, or make one in an empty directory.

        Raises ForeignRecord, RecordDamaged, RecordBusy, OSError.
        """
        self._dir = data_dir
        self._votes = data_dir / "votes"
        self._sync = sync
        self._failure = ""
        self._failing = threading.Lock()
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = _lock(data_dir)
        try:
            former = self._former(name, cluster)
            if former is None:
                former = Identity(new_id(), name, cluster, 0)
            self._votes.mkdir(mode=0o700, exist_ok=True)
            self.identity = replace(former, start_counter=former.start_counter + 1)
            self._write(data_dir / "arbiter", _identity_json(self.identity))
        except BaseException:
            self._lock.close()
            raise

    @property
    def failure(self) -> str:
        """Why nothing can be stored any more; empty while it can."""
        return self._failure

    def close(self) -> None:
        """Let go of the directory."""
        self._lock.close()

    def read(self, image: ImageId) -> ImageVotes:
        """Return what is known of an image. Raises RecordDamaged, ArbiterFailed."""
        path = self._votes / image
        fields = self._read(path)
        if fields is None:
            return ImageVotes()
        try:
            if (fields["arbiter"], fields["image"]) != (self.identity.id, image):
                raise ValueError("it is of another arbiter or image")
            found = ImageVotes(
                _number(fields["changes"]), tuple(_vote_of(vote) for vote in fields["votes"])
            )
        except (KeyError, TypeError, ValueError, AssertionError, HciError) as error:
            raise RecordDamaged(str(path), str(error)) from error
        return found

    def store(self, image: ImageId, votes: ImageVotes) -> None:
        """Make an image's votes durable. Raises ArbiterFailed, and then for ever."""
        fields = {
            "arbiter": self.identity.id,
            "image": image,
            "changes": votes.changes,
            "votes": [_vote_json(vote) for vote in votes.votes],
        }
        self._guarded(lambda: self._write(self._votes / image, fields))

    def drop(self, image: ImageId) -> bool:
        """Forget an image that was deleted, durably; return whether it was known here.

        Votes that came back with a power cut would say that etcd has lost the image. Raises
        ArbiterFailed.
        """
        path = self._votes / image
        if not path.exists():
            return False

        def unlink() -> None:
            path.unlink(missing_ok=True)
            self._sync_directory(self._votes)

        self._guarded(unlink)
        return True

    def images(self) -> list[ImageId]:
        """Return the images that are known here, by id."""
        found = []
        for path in self._votes.iterdir():
            try:
                found.append(image_id(path.name))
            except HciError:
                continue  # A file that was being written when the process ended.
        return sorted(found)

    def damaged(self) -> list[str]:
        """Read all votes; return what is wrong with those that cannot be used."""
        problems = []
        for image in self.images():
            try:
                self.read(image)
            except RecordDamaged as error:
                problems.append(str(error))
        return problems

    def _guarded(self, change: Callable[[], None]) -> None:
        with self._failing:
            if self._failure:
                raise ArbiterFailed(self.identity.name, self._failure)
        try:
            change()
        except OSError as error:
            with self._failing:
                self._failure = f"its disk failed: {error.strerror or error}"
            raise ArbiterFailed(self.identity.name, self._failure) from error

    def _former(self, name: str, cluster: str) -> Identity | None:
        path = self._dir / "arbiter"
        fields = self._read(path)
        if fields is None:
            if self._votes.exists() and any(self._votes.iterdir()):
                raise RecordDamaged(str(path), "it is missing, though there are votes")
            return None
        try:
            found = Identity(
                holder_id(fields["id"]),
                str(fields["name"]),
                str(fields["cluster"]),
                _number(fields["start_counter"]),
            )
        except (KeyError, TypeError, ValueError, HciError) as error:
            raise RecordDamaged(str(path), str(error)) from error
        if found.cluster != cluster:
            raise ForeignRecord(str(self._dir), "cluster", cluster, found.cluster)
        if found.name != name:
            raise ForeignRecord(str(self._dir), "arbiter", name, found.name)
        return found

    def _read(self, path: Path) -> dict[str, Any] | None:
        """Return the object in a file, or None where there is no file."""
        try:
            with path.open("rb") as file:
                content = file.read(FILE_BYTES_MAX + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RecordDamaged(str(path), error.strerror or str(error)) from error
        told, newline, body = content.partition(b"\n")
        if not newline or not body.endswith(b"\n") or len(content) > FILE_BYTES_MAX:
            raise RecordDamaged(str(path), "it is cut off")
        if told != digest([body]).hex().encode():
            raise RecordDamaged(str(path), "its digest is another")
        try:
            fields = json.loads(body)
        except ValueError as error:
            raise RecordDamaged(str(path), "it is not JSON") from error
        if not isinstance(fields, dict) or fields.get("v") != VERSION:
            raise RecordDamaged(str(path), "it is of a version this program does not know")
        return fields

    def _write(self, path: Path, fields: dict[str, Any]) -> None:
        body = json.dumps({**fields, "v": VERSION}, sort_keys=True).encode() + b"\n"
        new = path.with_name(path.name + _NEW)
        with new.open("wb") as file:
            file.write(digest([body]).hex().encode() + b"\n" + body)
            file.flush()
            self._sync(file.fileno())
        new.replace(path)
        self._sync_directory(path.parent)

    def _sync_directory(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._sync(descriptor)
        finally:
            os.close(descriptor)


def _lock(data_dir: Path) -> IO[bytes]:
    lock = (data_dir / "lock").open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise RecordBusy(str(data_dir)) from None
    return lock


def _identity_json(identity: Identity) -> dict[str, Any]:
    return {
        "id": identity.id,
        "name": identity.name,
        "cluster": identity.cluster,
        "start_counter": identity.start_counter,
    }


def _vote_json(vote: Vote) -> dict[str, Any]:
    return {
        "epoch": vote.epoch,
        "holder": vote.holder,
        "confirmed": _ballot_json(vote.confirmed),
        "prepared": _ballot_json(vote.prepared),
    }


def _ballot_json(ballot: Ballot | None) -> dict[str, Any] | None:
    if ballot is None:
        return None
    return {
        "epoch": ballot.epoch,
        "holder": ballot.holder,
        "generation": ballot.generation,
        "in_sync": sorted(ballot.in_sync),
    }


def _vote_of(fields: dict[str, Any]) -> Vote:
    holder = fields["holder"]
    vote = Vote(
        confirmed=_ballot_of(fields["confirmed"]),
        prepared=_ballot_of(fields["prepared"]),
        epoch=_number(fields["epoch"]),
        holder=None if holder is None else str(holder),
    )
    check(vote)
    return vote


def _ballot_of(fields: dict[str, Any] | None) -> Ballot | None:
    if fields is None:
        return None
    return Ballot(
        _number(fields["epoch"]),
        str(fields["holder"]),
        _number(fields["generation"]),
        frozenset(str(node) for node in fields["in_sync"]),
    )


def _number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no number")
    return value
