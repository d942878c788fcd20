"""Who is in sync: the rules of membership, per image and replica set.

A membership is the part of an image's record that says which nodes hold its current data. The
functions here propose the next one; proposing changes nothing. A proposal counts once etcd took
it (and, for a thin arbiter, once the arbiter granted and confirmed it), and writes that waited on
a lost node are answered only after the nodes in sync have stored it.

    situation (per replica set)              proposal
    a lost node, the rest meets the quorum   generation + 1, the lost node stale since the old one
    a lost node, the rest does not           unchanged: it stays in sync and writes wait for it
    a stale node was healed                  generation + 1, the node in sync again

Generations and epochs only grow. A set never falls below its quorum.
"""

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType

from shard.placement import ReplicaSet

Stale = Mapping[int, Mapping[str, int]]
"""{replica set index: {node: generation at which it was left behind}}, without empty sets."""

FIRST_GENERATION = 1
"""Generation of a new image. A node stale since 0 has missed everything."""


class Policy(StrEnum):
    """How a pool keeps its data."""

    REPLICA_3 = "replica-3"
    THIN_ARBITER = "thin-arbiter"

    @property
    def members(self) -> int:
        """Number of nodes in each replica set."""
        return {Policy.REPLICA_3: 3, Policy.THIN_ARBITER: 2}[self]

    @property
    def quorum(self) -> int:
        """Least number of nodes in sync with which a replica set may be written.

        A thin arbiter's grant stands in for the missing node of a pair.
        """
        return {Policy.REPLICA_3: 2, Policy.THIN_ARBITER: 1}[self]

    @property
    def has_arbiter(self) -> bool:
        """Whether an arbiter grants every change of the nodes in sync."""
        return self is Policy.THIN_ARBITER


class WhenFull(StrEnum):
    """What clients of a pool see where the disks of too many nodes are full."""

    STALL = "stall"
    """Their writes wait until there is room."""
    ENOSPC = "enospc"
    """Their writes fail with ENOSPC until there is room."""


@dataclass(frozen=True, slots=True)
class Membership:
    """Which nodes of an image are in sync. Checked when made: see `check`."""

    policy: Policy
    sets: tuple[ReplicaSet, ...]
    stale: Stale
    generation: int
    epoch: int

    def __post_init__(self) -> None:
        frozen = {index: MappingProxyType(dict(nodes)) for index, nodes in self.stale.items()}
        object.__setattr__(self, "stale", MappingProxyType(frozen))
        check(self)

    def in_sync(self, index: int) -> ReplicaSet:
        """Return the nodes of a replica set that hold all answered writes, in placement order."""
        stale = self.stale.get(index, {})
        return tuple(node for node in self.sets[index] if node not in stale)

    def in_sync_sets(self) -> list[frozenset[str]]:
        """Return the nodes in sync of each replica set, in no order."""
        return [frozenset(self.in_sync(index)) for index in range(len(self.sets))]

    def all_in_sync(self) -> frozenset[str]:
        """Return the nodes that are in sync in at least one replica set."""
        return frozenset(node for index in range(len(self.sets)) for node in self.in_sync(index))


@dataclass(frozen=True, slots=True)
class Ready:
    """Nothing to change: every node in sync is there."""


@dataclass(frozen=True, slots=True)
class Wait:
    """No replica set can go on without its missing nodes: writes to these sets wait for them."""

    waiting: Mapping[int, frozenset[str]]


@dataclass(frozen=True, slots=True)
class Change:
    """A proposed membership, one generation higher.

    `changed` names the replica sets that change and must store the new record before a waiting
    write is answered; `waiting` those that cannot change and wait, {set: missing nodes};
    `needs_grant` those for which the arbiter's grant comes first.
    """

    membership: Membership
    changed: frozenset[int]
    waiting: Mapping[int, frozenset[str]] = field(default_factory=dict)
    needs_grant: frozenset[int] = frozenset()


Plan = Change | Ready | Wait


def quorum_met(membership: Membership, index: int, reachable: Iterable[str] | None = None) -> bool:
    """Whether a replica set may answer writes: all its nodes in sync are there, and enough.

    Without `reachable` every node counts as there.
    """
    in_sync = set(membership.in_sync(index))
    return len(in_sync) >= membership.policy.quorum and (
        reachable is None or in_sync <= set(reachable)
    )


def short_of_space(membership: Membership, full: Set[str]) -> frozenset[int]:
    """Return the replica sets that fall below their quorum without the nodes that are `full`."""
    return frozenset(
        index
        for index in range(len(membership.sets))
        if full & set(membership.in_sync(index))
        and len(set(membership.in_sync(index)) - full) < membership.policy.quorum
    )


def lose(membership: Membership, lost: Iterable[str], emptied: Iterable[str] = ()) -> Plan:
    """Return how an image goes on without the nodes `lost`, which may be stale already.

    Nodes that are `emptied` (their store is not the one that was in sync) are stale since 0,
    nothing on them is believed, also where they are stale already.

    A set loses all of its lost nodes or none: taking out some of them would not let a write be
    answered, and would narrow the choice when one of them comes back.
    """
    return _change(membership, frozenset(lost), {}, frozenset(emptied))


def open_plan(membership: Membership, reachable: Iterable[str]) -> Plan:
    """Return what a new holder does about the nodes in sync that it does not reach.

    Ready: open. Change: store it first; the sets in its `waiting` are not served before their
    nodes are back. Wait: as that, for every set that misses a node.
    """
    return lose(membership, membership.all_in_sync() - frozenset(reachable))


def rejoin(
    membership: Membership,
    healed: Mapping[int, Iterable[str]],
    lost: Iterable[str] = (),
    emptied: Iterable[str] = (),
) -> Plan:
    """Return the membership that takes in healed nodes, and takes out lost ones with it.

    `healed` is {replica set: nodes}, each stale there and level now; one that is lost again stays
    stale. One change does both, since a set at its quorum can let its missing node go only as the
    healed one comes. `emptied` as for `lose`.
    """
    taken_in = {index: frozenset(nodes) for index, nodes in healed.items() if nodes}
    for index, nodes in taken_in.items():
        assert nodes <= set(membership.stale.get(index, {})), "only a stale node rejoins"
    return _change(membership, frozenset(lost), taken_in, frozenset(emptied))


def _change(
    membership: Membership,
    lost: frozenset[str],
    healed: Mapping[int, frozenset[str]],
    emptied: frozenset[str] = frozenset(),
) -> Plan:
    policy, next_generation = membership.policy, membership.generation + 1
    stale = {index: dict(nodes) for index, nodes in membership.stale.items()}
    changed: set[int] = set()
    waiting: dict[int, frozenset[str]] = {}
    for index in range(len(membership.sets)):
        taken_in = healed.get(index, frozenset()) - lost
        in_sync = set(membership.in_sync(index)) | taken_in
        missing = frozenset(in_sync & lost)
        if missing and len(in_sync - missing) < policy.quorum:
            waiting[index] = missing
            missing = frozenset()
        of_set = stale.get(index, {})
        distrusted = {node for node in of_set if node in emptied and of_set[node] != 0} - taken_in
        if taken_in or missing or distrusted:
            changed.add(index)
            of_set = stale.setdefault(index, {})
            of_set.update(dict.fromkeys(distrusted, 0))
            for node in taken_in:
                del of_set[node]
            since = {node: 0 if node in emptied else membership.generation for node in missing}
            of_set.update(since)
    if not changed:
        return Wait(waiting) if waiting else Ready()
    proposal = replace(
        membership,
        stale={index: nodes for index, nodes in stale.items() if nodes},
        generation=next_generation,
    )
    check_successor(membership, proposal)
    grants = frozenset(changed if policy.has_arbiter else ())
    return Change(proposal, frozenset(changed), waiting, grants)


def check(membership: Membership) -> None:
    """Assert what holds of every membership. Records from outside go through `problem_of` first."""
    problem = problem_of(
        membership.policy,
        membership.sets,
        membership.stale,
        membership.generation,
        membership.epoch,
    )
    assert problem is None, problem


def problem_of(
    policy: Policy, sets: tuple[ReplicaSet, ...], stale: Stale, generation: int, epoch: int
) -> str | None:
    """Return which rule these parts of a membership break, or None where they make one."""
    if not sets:
        return "an image has at least one replica set"
    if generation < FIRST_GENERATION:
        return "generations begin at 1"
    if epoch < 0:
        return "epochs begin at 0"
    if not all(0 <= index < len(sets) for index in stale):
        return "a stale entry names a replica set"
    for index, members in enumerate(sets):
        problem = _problem_of_set(policy, members, stale.get(index), generation)
        if problem is not None:
            return problem
    return None


def _problem_of_set(
    policy: Policy, members: ReplicaSet, stale: Mapping[str, int] | None, generation: int
) -> str | None:
    if len(members) != policy.members:
        return "a set has as many members as its policy says"
    if len(set(members)) != len(members):
        return "a node is in a set once"
    if stale is None:
        return None
    if not stale:
        return "a set without stale nodes has no entry"
    if not stale.keys() <= set(members):
        return "a stale node is a member of its set"
    if not all(0 <= since < generation for since in stale.values()):
        return "a node is stale since a former generation"
    if len(members) - len(stale) < policy.quorum:
        return "a set never falls below its quorum"
    return None


def check_successor(before: Membership, after: Membership) -> None:
    """Assert what holds between a membership and the next one of the same placement."""
    assert after.sets == before.sets, "membership does not move data"
    assert after.policy is before.policy, "a pool keeps its policy"
    assert after.generation == before.generation + 1, "one change, one generation"
    assert after.epoch >= before.epoch, "epochs never decrease"
    for index in range(len(after.sets)):
        for node, since in after.stale.get(index, {}).items():
            left = before.stale.get(index, {}).get(node, before.generation)
            assert since in (left, 0), "a stale node keeps the generation it was left at"
