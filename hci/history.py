"""`HistoryWatch`: whether a node may believe etcd, and its copy of what etcd said.

    state      event                                           next
    unchecked  etcd agrees with what the node knows            following
    unchecked  etcd is behind it, or is marked as lost         lost: marked in etcd, the copy frozen
    following  a change that etcd's own past contradicts,      lost
               or another member's mark
    following  history was missed, or a minute has passed      checked again
    lost       checked again each second: etcd agrees, since   following
               it was recovered or its latest state put back

A node that has lost faith serves data as before: gateways that hold images need no etcd for that.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

import structlog

from etcd import keys
from etcd.errors import EtcdError, RecordError
from etcd.images import ImageRecord
from etcd.interface import Changed, Etcd, KeyValue, Notice, Reread
from etcd.records import ClusterRecord, LostRecord
from shard.errors import HciError
from shard.ids import ImageId, image_id
from vmstore.catalog import Catalog
from vmstore.errors import RecordsLost
from vmstore.history import HeldRecord, Known, Verdict, decoded, judge, judge_copy
from vmstore.ledger import Ledger
from vmstore.stored import stored

log = structlog.get_logger()

CHECK_S = 60.0
"""Between two checks of all that a node holds, which find what no watch tells: an etcd that was put
back with revisions that go on."""

PROBLEMS_SHOWN = 3

Holdings = tuple[dict[ImageId, HeldRecord], frozenset[ImageId]]
"""The records in a node's store, and the images that were deleted there."""


class HistoryWatch:
    """Follows etcd for one node. `holdings` looks into its store; `deleted` hears of tombstones."""

    def __init__(
        self,
        member: str,
        etcd: Etcd,
        catalog: Catalog,
        ledger: Ledger,
        holdings: Callable[[], Holdings],
        deleted: Callable[[Iterable[ImageId]], None],
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock_s = clock_s
        self._member = member
        self._etcd = etcd
        self._catalog = catalog
        self._ledger = ledger
        self._holdings = holdings
        self._deleted = deleted
        self._lock = threading.Lock()
        self._watching = False
        self._due_s = 0.0
        self._revision = 0
        self.lost = ""
        """Why etcd is not believed; empty while it is."""

    def known(self) -> Known:
        """Return all that the node knows: its store, and its copy of the records."""
        held, deleted = self._holdings()
        return replace(self._ledger.known(), member=self._member, held=held, deleted=deleted)

    def check(self) -> bool:
        """Compare all that the node knows with etcd; return whether etcd may be believed.

        Raises EtcdError where etcd does not answer.
        """
        with self._lock:
            # What is read of the store first, etcd has had before.
            known = self.known()
            listing = self._etcd.get_prefix(keys.PREFIX)
            now = {item.key: item.value for item in listing.items}
            verdict = judge(known, now)
            marked = decoded(LostRecord, keys.LOST, now)
            if verdict.lost:
                self._lose(verdict, listing.items)
            elif marked is not None:
                self._found(str(RecordsLost(marked.by, marked.why)))
            else:
                self._believe(verdict, listing.items)
                # No notice comes of tombstones that this was the first to read.
                self._bury(image for image in tombstones(now) if image not in known.deleted)
            self._revision = listing.revision
            self._due_s = self._clock_s() + CHECK_S
        if not self._watching:
            self._etcd.watch(keys.PREFIX, self._on_notice, listing.revision + 1)
            self._watching = True
        return not self.lost

    def check_if_due(self) -> bool:
        """Check where it is time to; return whether etcd may be believed."""
        if self._clock_s() < self._due_s:
            return not self.lost
        return self.check()

    def _believe(self, verdict: Verdict, items: Iterable[KeyValue]) -> None:
        if self.lost:
            log.warning("history_recovered", node=self._member)
        self.lost = ""
        for image, why in verdict.contested.items():
            if image not in self._ledger.contested:
                log.error("image_contested", node=self._member, image=image, why=why)
        self._ledger.take(items, verdict.contested)

    def _lose(self, verdict: Verdict, items: Iterable[KeyValue]) -> None:
        shown = "; ".join(verdict.lost[:PROBLEMS_SHOWN])
        more = len(verdict.lost) - PROBLEMS_SHOWN
        why = shown + (f"; and {more} more" if more > 0 else "")
        self._found(str(RecordsLost(self._member, why)))
        cluster = next((item for item in items if item.key == keys.CLUSTER), None)
        try:
            found = stored(ClusterRecord, cluster) if cluster is not None else None
            self._catalog.mark_lost(self._member, why, found)
        except (EtcdError, RecordError) as error:
            log.warning("history_not_marked", node=self._member, why=str(error))

    def _found(self, why: str) -> None:
        if not self.lost:
            log.error("history_lost", node=self._member, why=why)
        self.lost = why

    def _on_notice(self, notice: Notice) -> None:
        if isinstance(notice, Reread):
            self._due_s = 0.0
            return
        with self._lock:
            # Those of before the last check are in what it has read.
            changes = [each for each in notice.changes if each.mod_revision > self._revision]
            if changes and not self.lost:
                self._follow(changes)

    def _follow(self, changes: Sequence[Changed]) -> None:
        """Take changes in, unless the past contradicts them; then all is checked anew."""
        records = self._ledger.records()
        now = {key: item.value for key, item in records.items()}
        for change in changes:
            now.pop(change.key, None)
            if change.value is not None:
                now[change.key] = change.value
        touched = {c.key: records[c.key] for c in changes if c.key in records}
        if keys.LOST in now or any(judge_copy(self._member, touched, now)):
            self._due_s = 0.0
            return
        self._ledger.follow(changes)
        self._bury(tombstones(change.key for change in changes if change.value is not None))

    def _bury(self, images: Iterable[ImageId]) -> None:
        deleted = list(images)
        if deleted:
            self._deleted(deleted)


def tombstones(found: Iterable[str]) -> Iterator[ImageId]:
    """Yield the images whose tombstones are among keys; a key that names none is foreign."""
    for key in found:
        if key.startswith(keys.TOMBSTONES):
            with suppress(HciError):
                yield image_id(key.removeprefix(keys.TOMBSTONES))


def held_record(image: ImageId, found: dict[str, object]) -> HeldRecord:
    """Return a record as the engine tells of it."""
    body, digest = found["body"], found["digest"]
    epoch, generation = found["epoch"], found["generation"]
    assert isinstance(body, bytes) and isinstance(digest, bytes), "the engine tells bytes"
    assert isinstance(epoch, int) and isinstance(generation, int), "the engine tells numbers"
    try:
        record = ImageRecord.decode(f"{keys.image(image)} of this node", body)
    except RecordError:
        record = None
    return HeldRecord(image, epoch, str(found["holder"]), generation, digest, record)
