"""`Readers`: snapshots that clients read through this gateway. No lease, no epoch, nothing written.

What a snapshot names never changes, and every node that is in sync now has it, so any gateway may
read it at any time, whoever holds the image. A node is asked only if etcd's record calls it in sync
as the first client comes; one that is left behind later still has what is frozen.

    a reader   is left by                                   to
    opening    a node of each replica set has let us in     open: clients that wait are let in
    opening    none has in time, or all refuse              ended: they are told why
    open       its last client leaves                       closing
    open       no node gives its layers any more            ended: its clients are sent away
    closing    the engine has let go                        ended; clients that came open it anew
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import structlog

from engine import Gateway
from etcd.images import ImageRecord, Snapshot
from shard.ids import ImageId
from vmstore.channels import Channels
from vmstore.names import SnapshotName

log = structlog.get_logger()


class _Phase(Enum):
    OPENING = auto()
    OPEN = auto()
    CLOSING = auto()


@dataclass(slots=True)
class _Reader:
    """A snapshot that is open, opening or closing; see the module's table."""

    channel: int
    name: SnapshotName
    snapshot: Snapshot
    key: tuple[ImageId, int]
    """Image and generation: a name may be given again."""
    phase: _Phase = _Phase.OPENING
    waiting: list[int] = field(default_factory=list)
    users: set[int] = field(default_factory=set)


class Readers:
    """The snapshots that one gateway reads; for the deciding thread.

    `let_in` answers a client that its export is there: (client, name, size in bytes, channel).
    `refuse` tells one why not, `again` has one ask anew that came while its snapshot was closed.
    """

    def __init__(
        self,
        engine: Gateway,
        channels: Channels,
        *,
        let_in: Callable[[int, SnapshotName, int, int], None],
        refuse: Callable[[int, str], None],
        again: Callable[[int, SnapshotName], None],
    ) -> None:
        self._engine = engine
        self._channels = channels
        self._let_in = let_in
        self._refuse = refuse
        self._again = again
        self._readers: dict[tuple[ImageId, int], _Reader] = {}
        self._by_channel: dict[int, _Reader] = {}
        self._of_client: dict[int, _Reader] = {}

    def __len__(self) -> int:
        return len(self._readers)

    def open(
        self, client: int, name: SnapshotName, record: ImageRecord, snapshot: Snapshot
    ) -> None:
        """Let a client in when the snapshot is open; `record` is the image's as etcd has it."""
        key = (record.id, snapshot.generation)
        reader = self._readers.get(key)
        if reader is None:
            reader = _Reader(self._channels.new(), name, snapshot, key)
            self._readers[key] = self._by_channel[reader.channel] = reader
            self._channels.open_reader(reader.channel, record, snapshot)
        self._of_client[client] = reader
        if reader.phase is _Phase.OPEN:
            self._use(reader, client)
        else:
            reader.waiting.append(client)

    def left(self, client: int) -> None:
        """A client is gone, whatever it had."""
        reader = self._of_client.pop(client, None)
        if reader is None:
            return
        reader.users.discard(client)
        if client in reader.waiting:
            reader.waiting.remove(client)
        self._close_if_unused(reader)

    def heard(self, event: dict[str, Any]) -> None:
        """Take an event of the engine, if it is of a reader."""
        reader = self._by_channel.get(event["channel"])
        if reader is None:
            return
        match event["event"]:
            case "reader_open" if reader.phase is _Phase.OPENING:
                reader.phase = _Phase.OPEN
                log.info("snapshot_opened", snapshot=str(reader.name))
                for client in self._take_waiting(reader):
                    self._use(reader, client)
                self._close_if_unused(reader)
            case "reader_failed":
                log.warning("snapshot_not_read", snapshot=str(reader.name), why=event["why"])
                self._end(reader)
                why = f"{reader.name} cannot be read: {event['why']}"
                for client in self._take_waiting(reader):
                    self._of_client.pop(client, None)
                    self._refuse(client, why)
            case "closed":
                self._end(reader)
                for client in self._take_waiting(reader):
                    self._of_client.pop(client, None)
                    self._again(client, reader.name)

    def stop(self) -> None:
        """Send all clients away, and let everything go."""
        for reader in list(self._readers.values()):
            reader.waiting.clear()
            self._engine.disconnect(reader.channel)
            self._close(reader)

    def _use(self, reader: _Reader, client: int) -> None:
        reader.users.add(client)
        self._let_in(client, reader.name, reader.snapshot.size_bytes, reader.channel)

    def _take_waiting(self, reader: _Reader) -> list[int]:
        waiting, reader.waiting = reader.waiting, []
        return waiting

    def _close_if_unused(self, reader: _Reader) -> None:
        if not reader.users and not reader.waiting:
            self._close(reader)

    def _close(self, reader: _Reader) -> None:
        if reader.phase is not _Phase.CLOSING:
            reader.phase = _Phase.CLOSING
            self._engine.close(reader.channel)

    def _end(self, reader: _Reader) -> None:
        """Drop it; its clients, if it has any, are sent away with it."""
        for client in reader.users:
            self._of_client.pop(client, None)
        self._engine.disconnect(reader.channel)
        self._engine.forget(reader.channel)
        del self._readers[reader.key]
        del self._by_channel[reader.channel]
