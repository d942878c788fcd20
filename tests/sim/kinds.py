"""The kinds of random histories: what befalls a cluster, and how often one thing or another."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from tests.sim.shape import Shape


@dataclass(frozen=True, slots=True)
class Kind:
    """What befalls a cluster, and how often one thing rather than another."""

    name: str
    faults: dict[str, int]
    shapes: tuple[Shape, ...] = (
        Shape(),
        Shape(nodes=4, gateways=3, replica_sets=2),
        Shape(nodes=5, gateways=2, replica_sets=3, shards=4),
    )
    sparse: bool = False
    """Guests write seldom, and flush almost never."""
    ledgers: bool = False
    """Nodes keep copies of etcd's records, and somebody recovers an etcd that lost them."""
    scrubs: bool = False
    """Gateways scrub, and a scrub ends it."""
    resizes: bool = False
    """Somebody changes the image's size."""
    snapshots: bool = False
    """Somebody takes snapshots and reads them; all are read at the end."""
    rollbacks: bool = False
    """Somebody has the image rolled back; nothing of dropped layers is left at the end."""
    removals: bool = False
    """Somebody removes snapshots; nothing is left of their layers at the end."""
    clones: bool = False
    """Somebody clones snapshots and uses the clones; all are read at the end."""
    processes: bool = False
    """Gateways know the processes of their guests."""
    some_away: bool = False
    """Some stay away when all other faults have ended: who can go on without them does."""


SMALL_LOG = Shape(log_bytes=512 << 10)
"""Soon full: checkpoints put the data into shard files all the time."""

PAIRS = (
    Shape(nodes=2, arbiter=True),
    Shape(nodes=3, gateways=3, replica_sets=3, arbiter=True),
)

SEVERAL_SETS = (
    Shape(nodes=4, gateways=2, replica_sets=2, shards=6),
    Shape(nodes=5, gateways=2, replica_sets=3, shards=6),
    Shape(nodes=6, gateways=2, replica_sets=2, shards=6),
)

HEALING = (
    Shape(),
    Shape(shards=12),
    Shape(nodes=5, gateways=2, replica_sets=3, shards=8),
    Shape(nodes=2, arbiter=True),
)

SPARSE = (
    Shape(shards=24),
    Shape(nodes=2, shards=24, arbiter=True),
)
"""So many shards that a heal's list has few of them."""

KINDS = (
    Kind("kills", {"kill_node": 6, "kill_gateway": 3, "crash_node": 2, "reset": 3}),
    Kind(
        "power",
        {"cut_node": 5, "cut_all": 2, "crash_node": 3, "cut_host": 2, "kill_gateway": 1,
         "interrupt_admission": 3},
    ),
    Kind(
        "network",
        {"partition": 5, "isolate": 3, "reset": 4, "slow_path": 3, "kill_node": 1, "pause_node": 2},
    ),
    Kind(
        "holders",
        {"pause_gateway": 5, "second": 4, "cut_host": 2, "kill_gateway": 2, "cut_etcd": 3,
         "partition": 2, "split": 14},
        # Blocks beside those that are waited for, or a holder that is cut off reads nothing more.
        (Shape(shards=16), Shape(shards=8), Shape(nodes=4, gateways=3, replica_sets=2, shards=8)),
    ),
    Kind(
        "etcd",
        {"etcd_down": 4, "cut_etcd": 4, "slow_etcd": 2, "kill_node": 4, "kill_gateway": 2,
         "second": 1},
    ),
    Kind(
        "disks",
        {"slow_disk": 3, "full_disk": 3, "fail_sync": 2, "crash_node": 3, "cut_node": 2,
         "kill_gateway": 1},
    ),
    Kind(
        "rot",
        {"rot": 8, "kill_node": 4, "cut_node": 2, "kill_gateway": 2, "cut_host": 1},
        (SMALL_LOG,),
    ),
    Kind(
        "swapped",
        {"snapshot": 6, "roll_back": 6, "kill_node": 2, "kill_gateway": 3, "cut_node": 1},
    ),
    Kind(
        "restored",
        {"back_up": 4, "restore_etcd": 3, "second": 3, "cut_host": 2, "kill_gateway": 3,
         "kill_node": 4, "pause_gateway": 2, "restore_under_two": 4},
    ),
    Kind(
        "everything",
        {"kill_node": 4, "cut_node": 3, "cut_all": 1, "crash_node": 2, "pause_node": 2,
         "kill_gateway": 2, "cut_host": 1, "pause_gateway": 2, "second": 2, "partition": 3,
         "isolate": 2, "reset": 3, "slow_path": 2, "etcd_down": 2, "cut_etcd": 2, "slow_etcd": 1,
         "slow_disk": 1, "full_disk": 1, "fail_sync": 1},
    ),
    Kind(
        "heals",
        {"interrupt_heal": 6, "interrupt_end_of_heal": 4, "leave_behind": 2, "guests_leave": 3,
         "second": 1, "kill_node": 1, "reset": 1, "full_disk": 1, "slow_path": 1,
         "slow_etcd": 1, "partition_peers": 1, "slow_peers": 1, "strike_pull": 4},
        HEALING,
    ),
    Kind(
        "missed",
        {"lose_with_write": 5, "slow_listing": 5, "lose_sources": 3},
        SPARSE,
        sparse=True,
    ),
    Kind("vanishing", {"vanish": 5, "reset": 1, "slow_path": 2}),
    Kind(
        "late",
        {"late_frames": 6, "reset": 2, "slow_path": 2, "kill_gateway": 1, "partition": 1},
    ),
    Kind(
        "pairs",
        {"lose_in_order": 5, "kill_node": 3, "cut_node": 2, "leave_behind": 2, "crash_node": 1,
         "kill_arbiter": 2, "cut_arbiter": 1, "crash_arbiter": 1, "pause_arbiter": 1,
         "cut_to_arbiter": 3, "slow_arbiter": 2, "cut_arbiter_from_etcd": 1, "etcd_down": 2,
         "cut_etcd": 2, "kill_gateway": 2, "pause_gateway": 1, "cut_host": 1, "partition": 2,
         "split": 2, "second": 2},
        PAIRS,
    ),
    Kind(
        "arbiters",
        {"empty_arbiter": 3, "snapshot_arbiter": 4, "roll_back_arbiter": 4, "replace_arbiter": 1,
         "crash_arbiter": 2, "cut_arbiter": 2, "lose_in_order": 3, "interrupt_heal": 3,
         "leave_behind": 3, "kill_node": 3, "kill_gateway": 3, "cut_to_arbiter": 1, "second": 1,
         "guests_leave": 1},
        PAIRS,
    ),
    Kind(
        "pairs restored",
        {"back_up": 4, "restore_etcd": 3, "leave_behind": 4, "kill_node": 3, "cut_host": 2,
         "kill_gateway": 3, "kill_arbiter": 2, "lose_in_order": 2, "second": 2},
        PAIRS,
    ),
    Kind(
        "levels",
        {"strike_levelling": 6, "lose_memory_but_one": 3, "flush_first": 3, "cut_node": 1},
        (Shape(shards=6), Shape(nodes=2, shards=6, arbiter=True)),
        sparse=True,
    ),
    Kind(
        "refused",
        {"refuse_by_rot": 8, "refuse_and_flush": 3, "full_disk": 1, "kill_node": 1, "reset": 1},
        (SMALL_LOG,),
    ),
    Kind(
        "recovered",
        {"back_up": 4, "restore_etcd": 3, "second": 2, "cut_host": 1, "kill_gateway": 2,
         "kill_node": 3, "leave_behind": 2, "cut_etcd": 1},
        ledgers=True,
    ),
    Kind(
        "scrubs",
        {"ask_scrub": 5, "rot": 6, "kill_node": 3, "cut_node": 1, "kill_gateway": 2,
         "leave_behind": 2, "guests_leave": 1, "second": 1},
        (SMALL_LOG, Shape(nodes=4, gateways=2, replica_sets=2, log_bytes=512 << 10)),
        scrubs=True,
    ),
    Kind(
        "sizes",
        {"shrink": 5, "grow": 3, "kill_node": 3, "leave_behind": 3, "kill_gateway": 2,
         "cut_node": 1, "slow_etcd": 1},
        (Shape(shards=4), Shape(nodes=4, gateways=2, replica_sets=2, shards=5)),
        resizes=True,
    ),
    Kind(
        "set back",
        {"set_back": 8, "kill_node": 4, "kill_gateway": 2, "cut_node": 1, "second": 1, "reset": 1,
         "etcd_down": 1, "leave_behind": 1},
        (Shape(), Shape(shards=6), Shape(nodes=5, gateways=2, replica_sets=3, shards=6)),
    ),
    Kind(
        "some away",
        {"kill_node": 4, "leave_behind": 3, "kill_gateway": 2, "reset": 2, "cut_node": 1},
        SEVERAL_SETS,
        some_away=True,
    ),
    Kind(
        "votes",
        {"strike_vote": 4, "strike_heal_vote": 4, "leave_behind": 1, "kill_gateway": 1,
         "cut_arbiter": 1},
        PAIRS,
        some_away=True,
    ),
    Kind(
        "comes back",
        {"come_back": 8, "kill_gateway": 1, "second": 1},
        processes=True,
    ),
    Kind(
        "twins",
        {"second_process": 6, "kill_gateway": 2, "second": 1, "pause_gateway": 1},
    ),
    Kind(
        "half copied",
        {"strike_half_copied": 6, "kill_gateway": 1, "kill_node": 1},
        (Shape(shards=4), Shape(nodes=2, shards=4, arbiter=True)),
        sparse=True,
    ),
    Kind(
        "repairs",
        {"strike_repair": 8, "kill_node": 1},
        (Shape(gateways=3, log_bytes=512 << 10),),
    ),
    Kind(
        "snapshots",
        {"take_snapshot": 7, "strike_snapshot": 6, "read_snapshot": 6, "kill_node": 2,
         "kill_gateway": 2, "cut_node": 2, "leave_behind": 2, "reset": 1, "slow_etcd": 2,
         "etcd_down": 2, "cut_etcd": 1, "second": 1, "cut_host": 1, "partition": 1,
         "pause_gateway": 1, "cut_all": 1, "shrink": 1, "grow": 2, "interrupt_heal": 1},
        (Shape(), Shape(shards=6), Shape(nodes=5, gateways=2, replica_sets=3, shards=6),
         Shape(nodes=6, gateways=2, replica_sets=2, shards=6), Shape(nodes=2, arbiter=True)),
        # No disk is put back: the only one in sync of a pair would tell nothing right any more.
        snapshots=True,
    ),
    Kind(
        "rollbacks",
        {"take_snapshot": 7, "roll_back_image": 9, "strike_rollback": 8, "roll_back_elsewhere": 1,
         "read_snapshot": 3, "kill_node": 2, "kill_gateway": 1, "cut_node": 1, "leave_behind": 4,
         "reset": 1, "slow_etcd": 1, "etcd_down": 1, "second": 1, "cut_host": 1, "cut_all": 1,
         "shrink": 1, "grow": 2, "interrupt_heal": 1},
        (Shape(), Shape(shards=6), SMALL_LOG,
         Shape(nodes=5, gateways=2, replica_sets=3, shards=6), Shape(nodes=2, arbiter=True)),
        snapshots=True, rollbacks=True,
    ),
    Kind(
        "removals",
        {"take_snapshot": 12, "remove_snapshot": 12, "strike_removal": 5, "roll_back_image": 1,
         "read_snapshot": 3, "kill_node": 3, "kill_gateway": 2, "cut_node": 2, "crash_node": 2,
         "leave_behind": 5, "reset": 1, "slow_etcd": 2, "etcd_down": 1, "cut_etcd": 1, "second": 1,
         "cut_host": 1, "cut_all": 1, "guests_leave": 1, "interrupt_heal": 2, "slow_disk": 1},
        (Shape(), Shape(shards=6), SMALL_LOG, SMALL_LOG,
         Shape(nodes=5, gateways=2, replica_sets=3, shards=6), Shape(nodes=2, arbiter=True)),
        snapshots=True, rollbacks=True, removals=True,
    ),
    Kind(
        "clones",
        {"take_snapshot": 8, "make_clone": 9, "strike_clone": 4, "use_clone": 16,
         "read_snapshot": 1, "remove_snapshot": 4, "roll_back_image": 2, "kill_node": 3,
         "cut_node": 2, "crash_node": 1, "kill_gateway": 2, "leave_behind": 6, "reset": 1,
         "slow_etcd": 1, "etcd_down": 1, "second": 1, "interrupt_heal": 3, "guests_leave": 2},
        (Shape(gateways=3), Shape(gateways=3, shards=6), Shape(gateways=3, log_bytes=512 << 10),
         Shape(nodes=5, gateways=3, replica_sets=3, shards=6), Shape(nodes=2, arbiter=True)),
        snapshots=True, rollbacks=True, removals=True, clones=True,
    ),
)  # fmt: skip

SEEDS = 32
"""A seed's remainder by it chooses the kind, so that another kind at the end changes no seed of the
others. Kinds for which there is no remainder left have the seeds below 0."""


def kind_of(seed: int) -> Kind:
    """Return the kind of a seed's history."""
    kinds = KINDS[:SEEDS] if seed >= 0 else KINDS[SEEDS:]
    return kinds[(seed if seed >= 0 else -1 - seed) % SEEDS % len(kinds)]


def seeds_of(kind: str) -> Iterator[int]:
    """Yield the seeds of a kind."""
    index = next(i for i, known in enumerate(KINDS) if known.name == kind)
    if index < SEEDS:
        yield from itertools.count(index, SEEDS)
    yield from itertools.count(SEEDS - 1 - index, -SEEDS)


def seeds_from(first: int) -> Iterator[int]:
    """Yield seeds of all kinds, as often of one as of another."""
    later = len(KINDS[SEEDS:])
    for number in itertools.count(first):
        yield number
        if number % SEEDS == SEEDS - 1:
            block = number // SEEDS * SEEDS
            yield from (-1 - block - index for index in range(later))
