"""Which stale node is healed, and which closed image is looked after."""

import random
from dataclasses import replace

import pytest

from etcd.images import ImageRecord, Layer, Parent
from etcd.memory import MemoryEtcd
from etcd.records import LeaseRecord
from shard.ids import ImageId
from shard.membership import Membership, Policy
from tests.unit.vmstore.test_holder import record
from vmstore import caretaker as c
from vmstore import healing as h
from vmstore.caretaker import Caretaker
from vmstore.catalog import Catalog, ImageEntry
from vmstore.names import ImageName
from vmstore.stored import Stored

SETS = (("a", "b", "c"), ("c", "d", "e"), ("a", "d", "f"))


def membership(stale: dict[int, dict[str, int]]) -> Membership:
    return Membership(policy=Policy.REPLICA_3, sets=SETS, stale=stale, generation=9, epoch=1)


def begin(heals: h.Heals, of: Membership, *, serving: str = "abcdef", now_s: float = 0.0):  # type: ignore[no-untyped-def]
    return heals.begin(of, lambda _: True, lambda _: 1, set(serving), now_s)


def test_node_is_healed_in_all_its_sets_at_once() -> None:
    begun = begin(h.Heals(), membership({0: {"c": 4}, 1: {"c": 7}}))
    assert (begun.node, begun.sets) == ("c", {0: 4, 1: 7})


def test_set_without_a_source_waits() -> None:
    heals = h.Heals()
    of = membership({0: {"c": 4}, 1: {"c": 7}})
    assert begin(heals, of, serving="ab").sets == {0: 4}
    assert begin(h.Heals(), of, serving="f") is None


def test_one_node_after_the_other_and_one_that_fails_keeps_none_waiting() -> None:
    heals = h.Heals()
    of = membership({0: {"a": 4}, 1: {"e": 7}})
    first = begin(heals, of)
    assert first.node == "a" and begin(heals, of) is None
    assert heals.failed(first.attempt, 0.0) == "a"
    assert begin(heals, of).node == "e"


def test_pauses_double_up_to_a_bound_and_end_when_the_node_comes_anew() -> None:
    heals = h.Heals()
    of = membership({0: {"a": 4}})
    now_s, pauses = 0.0, []
    for _ in range(12):
        begun = begin(heals, of, now_s=now_s)
        heals.failed(begun.attempt, now_s)
        failed_s = now_s
        while begin(heals, of, now_s=now_s) is None:
            now_s += 0.5
        heals.now = None
        pauses.append(now_s - failed_s)
    assert pauses[:3] == [1.0, 2.0, 4.0] and pauses[-1] == h.LONGEST_PAUSE_S
    heals.failed(heals.attempts, now_s)
    heals.came("a")
    assert begin(heals, of, now_s=now_s) is not None


def entry(number: int, **changes: object) -> ImageEntry:
    stale: ImageRecord = record(generation=2, stale={0: {"node3": 1}}, id=ImageId(f"{number:032x}"))
    stale = replace(stale, **changes)  # type: ignore[arg-type]
    return ImageEntry(ImageName("vms", str(number)), Stored(stale.key, stale, b"", 1))


ALIVE = {"node1", "node2", "node3"}


MERGING = {"layers": (Layer(id=2), Layer(id=1)), "merging": (1,)}
"""A snapshot of it was removed."""


@pytest.mark.parametrize(
    ("found", "leased", "alive", "expected"),
    [
        (entry(1), False, ALIVE, True),
        (entry(1, stale={}), False, ALIVE, False),
        (entry(1), True, ALIVE, False),
        (entry(1), False, {"node1", "node2"}, False),
        (entry(1), False, {"node1", "node3"}, False),
        (entry(1, stale={}, **MERGING), False, ALIVE, True),
        (entry(1, stale={}, **MERGING), True, ALIVE, False),
        (entry(1, stale={}, **MERGING), False, {"node1", "node2"}, False),
    ],
)
def test_closed_image_is_looked_after_when_all_that_it_takes_is_alive(
    found: ImageEntry, leased: bool, alive: set[str], expected: bool
) -> None:
    lease = LeaseRecord(gateway="g", holder="1" * 32, epoch=1)
    leases = {found.image.record.id: lease} if leased else {}
    assert c.waiting([found], leases, alive) == ([found] if expected else [])


def test_clone_is_left_alone_while_its_parent_waits_for_the_same_node() -> None:
    parent = entry(1)
    begins = Parent(image=parent.image.record.id, layer=1, generation=1, size_bytes=1 << 30)
    clone = entry(2, parent=begins, placement_key=begins.image)
    later = entry(3, parent=replace(begins, image=clone.image.record.id), stale={0: {"node3": 0}})
    assert c.waiting([clone, parent, later], {}, ALIVE) == [parent]
    level = replace(parent.image, record=replace(parent.image.record, stale={}))
    healed = replace(parent, image=level)
    assert c.waiting([clone, healed, later], {}, ALIVE) == [clone]


class Looking(Catalog):
    """A catalogue of so many images that wait."""

    def __init__(self, count: int) -> None:
        super().__init__(MemoryEtcd())
        self.looks = 0
        self._entries = [entry(number) for number in range(count)]

    def images(self, pool: str | None = None) -> list[ImageEntry]:
        self.looks += 1
        return self._entries

    def leases(self) -> dict[ImageId, LeaseRecord]:
        return {}

    def alive(self) -> dict[str, object]:  # type: ignore[override]
        return dict.fromkeys(ALIVE, None)


def test_caretaker_begins_few_at_a_time_and_tries_again_after_pauses_that_grow() -> None:
    begun: list[ImageName] = []
    catalog = Looking(1)
    caretaker = Caretaker(catalog, begun.append, lambda: 0, random.Random(1))
    times = [now_s for now_s in range(4000) if (caretaker.look(float(now_s)), len(begun))[1]]
    assert times[0] == 0
    assert 8 <= len(begun) <= 14, "5 s, 10 s, and so on up to ten minutes"
    assert catalog.looks <= 4000 / c.POLL_S[0] + len(begun)

    begun.clear()
    many = Caretaker(Looking(10), begun.append, lambda: min(2, len(begun)), random.Random(1))
    many.look(0.0)
    assert len(begun) == c.AT_ONCE
    many.look(100.0)
    assert len(begun) == c.AT_ONCE, "those under way count"
