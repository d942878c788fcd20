"""Changes of membership with a thin arbiter, in every order of losing and regaining its parts.

Safety: no write is answered by a node that lacks an answered one, not even with etcd put back to an
older state. Liveness: with etcd there, writes go on exactly where two of three agree.
"""

import random

import pytest

from arbiter.errors import ArbiterUnreachable
from etcd.errors import OutcomeUnknown
from shard.ids import ImageId
from tests.unit.vmstore.pair_model import NODES, Arbiter, Violation, World
from vmstore import granting
from vmstore.errors import ArbiterNotFilled
from vmstore.granting import Commit, Confirm, Look, Prepare

SEEDS = 100
ACTIONS = 150
CATCH_SEEDS = 1000
"""Histories among which one must notice that a rule is broken."""


def breaks(seed: int, arbiter: Arbiter) -> bool:
    """Whether a history with etcd put back at times breaks the rule of safety."""
    world = World(random.Random(seed), arbiter=arbiter)
    try:
        for _ in range(ACTIONS):
            world.act(rollback=True)
    except Violation:
        return True
    return False


def history(seed: int, *, rollback: bool) -> World:
    world = World(random.Random(seed))
    for _ in range(ACTIONS):
        world.act(rollback=rollback)
    return world


@pytest.mark.parametrize("part", range(5))
def test_no_node_answers_that_lacks_a_write_also_with_etcd_rolled_back(part: int) -> None:
    writes = changes = 0
    for seed in range(part * SEEDS, (part + 1) * SEEDS):
        world = history(seed, rollback=seed % 2 == 0)
        writes += world.writes
        changes += world.arbiter.changes
    assert writes > SEEDS, "the histories answer writes"
    assert changes > SEEDS, "the histories ask the arbiter"


@pytest.mark.parametrize("part", range(2))
def test_writes_go_on_exactly_where_two_of_three_agree(part: int) -> None:
    for seed in range(part * SEEDS, (part + 1) * SEEDS):
        world = history(seed, rollback=False)
        a, b, arbiter = bool(seed & 1), bool(seed & 2), bool(seed & 4)
        world.calm(a=a, b=b, arbiter=arbiter)
        record = world.catalog.image(world.image).record
        in_sync = set(record.membership.in_sync(0))
        up = {name for name, is_up in zip(NODES, (a, b), strict=True) if is_up}
        agree = bool(in_sync & up) and (arbiter or in_sync == up == set(NODES))
        assert world.can_write() is agree, (seed, record)


def test_all_is_in_sync_after_the_last_fault() -> None:
    for seed in range(SEEDS):
        world = history(seed, rollback=False)
        world.calm(a=True, b=True, arbiter=True)
        assert world.can_write()
        gateway = world.gateways[-1]
        for _ in range(20):
            world.go_on(gateway)
        assert world.catalog.image(world.image).record.stale == {}, seed
        assert world.current == set(NODES), seed


def test_nothing_changes_without_etcd_and_goes_on_with_it() -> None:
    world = World(random.Random(0))
    assert world.can_write()
    gateway = world.gateways[-1]
    world.calm(a=True, b=True, arbiter=True, etcd=False)
    assert world.write(gateway), "what needs no change of membership goes on"
    world.nodes["b"].up = False
    for _ in range(20):
        world.go_on(gateway)
        assert not world.write(gateway)
    world.etcd.up = True
    for _ in range(20):
        world.go_on(gateway)
    assert world.write(gateway)
    assert world.current == {"a"}


# Each rule, broken on purpose: the histories above notice.


class Forgetful(Arbiter):
    """Confirms without remembering: as if a write were answered before it is confirmed."""

    def confirm(self, to: object, image: ImageId, stated: object) -> int:
        if not self.up:
            raise ArbiterUnreachable("w", "w:1", "down")
        return self.changes


def test_writes_answered_before_the_arbiter_confirmed_are_caught() -> None:
    assert any(breaks(seed, Forgetful()) for seed in range(CATCH_SEEDS))


@pytest.mark.parametrize("asks", [True, False])
def test_opener_has_confirmed_what_its_predecessor_left_in_etcd(
    asks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A holder ends between etcd and the arbiter; the next one answers; etcd is put back."""
    if not asks:
        monkeypatch.setattr(granting, "needs_arbiter_to_open", lambda _record: False)
    world = World(random.Random(0))
    assert world.can_write()
    before = world.stored()
    gateway = world.gateways[-1]
    world.nodes["b"].up = False
    while not isinstance(gateway.pending, Confirm):
        world.go_on(gateway)
    world.crash(gateway)
    assert world.can_write()
    assert world.current == {"a"}
    world.calm(a=False, b=True, arbiter=True)
    world.put_back(before)
    if asks:
        assert not world.can_write()
    else:
        with pytest.raises(Violation):
            world.can_write()


# The steps, one by one.


def test_steps_come_in_the_order_that_the_design_says() -> None:
    world = World(random.Random(0))
    assert world.can_write()
    gateway = world.gateways[-1]
    world.nodes["b"].up = False
    kinds = []
    for _ in range(20):
        world.go_on(gateway)
        if gateway.pending is not None:
            kinds.append(type(gateway.pending))
    assert kinds[:4] == [Look, Prepare, Commit, Confirm]
    assert gateway.record.grant is not None
    assert gateway.record.grant.arbiter == "f" * 32


def test_change_that_etcd_took_unheard_is_only_confirmed_at_the_next_attempt() -> None:
    world = World(random.Random(0))
    assert world.can_write()
    gateway = world.gateways[-1]
    world.nodes["b"].up = False
    while not isinstance(gateway.pending, Confirm):
        world.go_on(gateway)
    world.arbiter.up = False
    world.go_on(gateway)
    assert gateway.pending is None
    assert not world.write(gateway), "etcd has it, the arbiter has not confirmed it"
    world.arbiter.up = True
    kinds = []
    for _ in range(6):
        world.go_on(gateway)
        kinds.append(type(gateway.pending))
    assert kinds[1:3] == [Look, Confirm]
    assert world.write(gateway)


def test_pool_whose_arbiter_is_not_filled_grants_nothing() -> None:
    world = World(random.Random(0))
    assert world.can_write()
    gateway = world.gateways[-1]
    assert gateway.held is not None
    pool, arbiter = world.catalog.pool("p"), world.catalog.arbiter("w")
    half = world.catalog.assign_arbiter(pool, arbiter, filled=False)
    world.nodes["b"].up = False
    for _ in range(20):
        world.go_on(gateway)
        assert not world.write(gateway)
    assert granting.may_pass(ArbiterNotFilled("w", "p"))
    world.catalog.assign_arbiter(half, arbiter, filled=True)
    for _ in range(20):
        world.go_on(gateway)
    assert world.write(gateway)


def test_arbiter_exchanged_between_grant_and_commit_is_asked_instead() -> None:
    world = World(random.Random(0))
    assert world.can_write()
    gateway = world.gateways[-1]
    world.nodes["b"].up = False
    while not isinstance(gateway.pending, Commit):
        world.go_on(gateway)
    pool, arbiter = world.catalog.pool("p"), world.catalog.arbiter("w")
    world.catalog.assign_arbiter(pool, arbiter, filled=False)
    world.catalog.assign_arbiter(world.catalog.pool("p"), arbiter, filled=True)
    world.go_on(gateway)
    assert isinstance(gateway.pending, Look), "the grant was that of another arbiter"
    for _ in range(20):
        world.go_on(gateway)
    assert world.write(gateway)


def test_unknown_outcome_may_pass() -> None:
    assert granting.may_pass(OutcomeUnknown("e", "lost"))
