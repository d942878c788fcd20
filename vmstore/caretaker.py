"""`Caretaker`: finds images that nobody has open and that wait to be healed, or for a merge to end.

Every gateway looks, when a node comes or an image is closed and now and then, each at moments of
its own; the first to take the lease heals. What it takes is a lease for maintenance, which yields
to whoever wants the image for a client.
"""

import random
import threading
from collections.abc import Callable, Collection, Mapping, Sequence

import structlog

from etcd import keys
from etcd.errors import EtcdError
from etcd.interface import Notice
from etcd.records import LeaseRecord
from shard.ids import ImageId
from vmstore.catalog import Catalog, ImageEntry
from vmstore.names import ImageName

log = structlog.get_logger()

AT_ONCE = 2
"""Images that one gateway heals at the same time."""

NOTICED_S = (0.2, 1.5)
"""From a notice to a look: gateways look one after the other; many notices cause one look."""

POLL_S = (20.0, 40.0)
"""Between looks without a notice; they find what a notice was lost of, or what failed before."""

FIRST_PAUSE_S = 5.0
LONGEST_PAUSE_S = 600.0
"""Until an image is tried again that was opened and not healed: each try raises its epoch."""


def waiting(
    images: Sequence[ImageEntry], leases: Mapping[ImageId, LeaseRecord], alive: Collection[str]
) -> list[ImageEntry]:
    """Return the images to heal: nobody has them open, and all nodes in sync
    and a stale one are alive. And those whose layers are merged, with all nodes alive.

    A clone waits for its parent to be healed on a node, and that one for its own."""
    found = []
    by_id = {entry.image.record.id: entry.image.record for entry in images}
    for entry in images:
        record = entry.image.record
        parent = by_id.get(record.parent.image) if record.parent is not None else None
        lacking = parent.lacking(record.parent.generation) if parent and record.parent else {}
        stale = {
            node
            for index, nodes in record.stale.items()
            for node in nodes
            if node not in lacking.get(index, ())
        }
        in_sync = record.membership.all_in_sync()
        heals = in_sync <= set(alive) and stale & set(alive)
        merges = record.merging and {n for nodes in record.sets for n in nodes} <= set(alive)
        if record.id not in leases and (heals or merges):
            found.append(entry)
    return found


class Caretaker:
    """Looks for one gateway. `look` is called by one thread, now and then."""

    def __init__(
        self,
        catalog: Catalog,
        maintain: Callable[[ImageName], None],
        busy: Callable[[], int],
        chance: random.Random,
    ) -> None:
        self._catalog = catalog
        self._maintain = maintain
        self._busy = busy
        self._chance = chance
        self._noticed = threading.Event()
        self._node_came = threading.Event()
        self._due_s = 0.0
        self._tries: dict[ImageId, int] = {}
        self._not_before_s: dict[ImageId, float] = {}

    def watch(self) -> None:
        """Be told by etcd when a node comes or an image is closed."""
        etcd = self._catalog.etcd
        etcd.watch(keys.ALIVE, self._on_alive)
        etcd.watch(keys.LEASES, self._on_lease)

    def _on_alive(self, _notice: Notice) -> None:
        self._node_came.set()
        self._noticed.set()

    def _on_lease(self, _notice: Notice) -> None:
        self._noticed.set()

    def look(self, now_s: float) -> None:
        """Look for an image to heal, if it is time to. `now_s` is on a clock that only grows."""
        if self._noticed.is_set():
            self._noticed.clear()
            self._due_s = min(self._due_s, now_s + self._chance.uniform(*NOTICED_S))
        if now_s < self._due_s:
            return
        self._due_s = now_s + self._chance.uniform(*POLL_S)
        if self._node_came.is_set():
            # What failed without it may work now.
            self._node_came.clear()
            self._not_before_s.clear()
            self._tries.clear()
        try:
            found = waiting(
                self._catalog.images(), self._catalog.leases(), self._catalog.alive().keys()
            )
        except EtcdError as error:
            log.warning("caretaker_waits", why=str(error))
            return
        self._begin(found, now_s)

    def _begin(self, found: Sequence[ImageEntry], now_s: float) -> None:
        known = {entry.image.record.id for entry in found}
        self._tries = {image: tries for image, tries in self._tries.items() if image in known}
        self._not_before_s = {i: s for i, s in self._not_before_s.items() if i in known}
        due = [e for e in found if self._not_before_s.get(e.image.record.id, now_s) <= now_s]
        self._chance.shuffle(due)
        for entry in due[: max(0, AT_ONCE - self._busy())]:
            image = entry.image.record.id
            tries = self._tries[image] = self._tries.get(image, 0) + 1
            pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(tries - 1, 16))
            self._not_before_s[image] = now_s + pause_s
            self._maintain(entry.name)
        # Those under way are found leased by then, or to be tried again.
        self._due_s = min([self._due_s, *self._not_before_s.values()])
        if len(due) > AT_ONCE:
            self._noticed.set()
