"""Giving pools another thin arbiter, while gateways run.

    1  the pool names the new arbiter, not filled      from here on the old one grants nothing that
                                                       etcd takes, and the new one is not asked yet
    2  the new arbiter hears what etcd holds of each   what etcd took before step 1 is in it
       image of the pool
    3  the pool's arbiter is filled                    it grants
    4  the old arbiter is retired                      it ends, and never comes back under its name

A crash between steps leaves pools that are not filled: their images go on until a node is lost, and
the same command goes on where it was. The new arbiter knows only what etcd says, so etcd must be
right: with a node missing nothing else could tell that etcd was put back to an older state.
"""

from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass

from arbiter import arbiter_pb2 as pb
from arbiter.client import Voter
from arbiter.errors import OtherArbiter
from arbiter.exchange import Addressee
from etcd.images import ImageRecord
from etcd.records import ArbiterRecord, PoolRecord
from vmstore.catalog import Catalog
from vmstore.errors import BadReplacement, ReplaceRefused, UnknownImage
from vmstore.granting import statement
from vmstore.stored import Stored


@dataclass(frozen=True, slots=True)
class Replaced:
    """What was done: the pools that have the new arbiter, and the images it was told of."""

    pools: tuple[str, ...]
    images: int


def replace_arbiter(
    catalog: Catalog,
    old: str,
    new: str,
    voter: Callable[[ArbiterRecord], Voter],
    *,
    up: Callable[[], Set[str]],
    forced: Callable[[ReplaceRefused], None] | None = None,
) -> Replaced:
    """Have the arbiter `new` vote wherever `old` did.

    `voter` asks an arbiter, and `up` tells which nodes answer now. `forced` hears, before anything
    is changed, why this would be refused; without it that is raised.

    Raises UnknownArbiter, ArbiterRetired, BadReplacement, ArbiterBesideData, ReplaceRefused,
    RecordsLost, and what asking the new arbiter raises: where it cannot be reached nothing has
    changed.
    """
    if old == new:
        raise BadReplacement(f"arbiter {old} cannot replace itself: name a new one, empty")
    # Forced or not: an arbiter that is filled from an etcd known to be behind bears witness to it.
    catalog.check_history()
    arbiters = catalog.arbiters()
    target = catalog.arbiter(new)
    pools = _pools_of(catalog, {old, new})
    begun = [pool for pool in pools if pool.record.arbiter == new and not pool.record.filled]
    wanted = [pool for pool in pools if pool.record.arbiter == old]
    if old not in arbiters or (arbiters[old].retired and not begun and not wanted):
        catalog.arbiter(old)
    for pool in wanted:
        catalog.check_apart(pool.record, target.record)
    for refusal in _refusals(catalog, old, [*wanted, *begun], up()):
        if forced is None:
            raise refusal
        forced(refusal)
    asked = voter(target.record)

    def hand_over(pools: list[Stored[PoolRecord]]) -> int:
        told = 0
        for pool in pools:
            assigned = catalog.assign_arbiter(pool, target, filled=False)
            told += _fill(catalog, assigned.record, target.record, asked)
            catalog.assign_arbiter(assigned, target, filled=True)
        return told

    told = hand_over([*wanted, *begun])
    if not arbiters[old].retired:
        catalog.retire_arbiter(old)
    # Made meanwhile; by a retired one no more are made.
    late = _pools_of(catalog, {old})
    told += hand_over(late)
    return Replaced(tuple(pool.record.name for pool in [*wanted, *begun, *late]), told)


def check_candidate(record: ArbiterRecord, status: pb.ArbiterStatus) -> None:
    """Raise OtherArbiter where who answers at an arbiter's address is not the registered one."""
    if status.arbiter_id != record.id:
        detail = f"it is {status.name} of cluster {status.cluster_id}, id {status.arbiter_id}"
        raise OtherArbiter(record.name, record.address, detail)


def _pools_of(catalog: Catalog, arbiters: set[str]) -> list[Stored[PoolRecord]]:
    names = [name for name, pool in catalog.pools().items() if pool.arbiter in arbiters]
    return [catalog.pool(name) for name in sorted(names)]


def _refusals(
    catalog: Catalog, old: str, pools: list[Stored[PoolRecord]], up: Set[str]
) -> Iterator[ReplaceRefused]:
    """Yield where a node is missing or stale that could contradict etcd."""
    for pool in pools:
        name = pool.record.name
        placed = {node for nodes in catalog.placement(name).record.sets for node in nodes}
        missing = sorted(placed - up)
        if missing:
            yield ReplaceRefused(old, f"{', '.join(missing)} of pool {name} is not running")
        for entry in catalog.images(name):
            stale = {node for nodes in entry.image.record.stale.values() for node in nodes}
            if stale:
                yield ReplaceRefused(
                    old, f"{', '.join(sorted(stale))} is stale for image {entry.name}"
                )


def _fill(catalog: Catalog, pool: PoolRecord, arbiter: ArbiterRecord, asked: Voter) -> int:
    """Tell an arbiter what etcd holds of the images of a pool; return of how many."""
    told = 0
    for entry in catalog.images(pool.name):
        try:
            # Read anew: a holder may have come since the listing, with a later epoch.
            record = catalog.image(entry.image.record.id).record
        except UnknownImage:
            continue
        if _was_held(record):
            asked.confirm(
                Addressee(arbiter.id, arbiter.start_counter), record.id, statement(record)
            )
            told += 1
    return told


def _was_held(record: ImageRecord) -> bool:
    """Whether an image was ever opened; before that there is nothing to be told."""
    return record.holder is not None
