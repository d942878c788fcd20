"""Arbiters in the records: registering, serving pools, and taking another one's place."""

from dataclasses import replace

import pytest

from arbiter import arbiter_pb2 as pb
from arbiter.errors import ArbiterUnreachable, OtherArbiter
from arbiter.exchange import Addressee
from arbiter.statement import Statement
from etcd.memory import MemoryEtcd
from etcd.records import ArbiterRecord
from shard.ids import ImageId
from shard.membership import Change, Policy, lose
from shard.placement import FailureDomain
from tests.unit.samples import node_record
from vmstore.catalog import Catalog
from vmstore.errors import (
    ArbiterBesideData,
    ArbiterNotNeeded,
    ArbiterRetired,
    ArbiterRolledBack,
    BadReplacement,
    ForeignArbiter,
    NoArbiter,
    RecordsLost,
    ReplaceRefused,
    TooFewNodes,
    UnknownArbiter,
)
from vmstore.holding import Held
from vmstore.names import ImageName
from vmstore.replacing import check_candidate, replace_arbiter

NODES = {"a", "b"}


def arbiter(name: str = "w", *, start_counter: int = 1, host: str = "far") -> ArbiterRecord:
    return ArbiterRecord(
        name=name,
        id=name.encode().hex().rjust(32, "0"),
        address=f"{name}:7401",
        host=host,
        start_counter=start_counter,
    )


@pytest.fixture
def etcd() -> MemoryEtcd:
    return MemoryEtcd()


@pytest.fixture
def catalog(etcd: MemoryEtcd) -> Catalog:
    """Two nodes and an arbiter."""
    catalog = Catalog(etcd)
    for name in sorted(NODES):
        node = node_record(1, name=name, host=f"host-{name}")
        catalog.announce_node(node, etcd.grant_lease(60))
    catalog.announce_arbiter(arbiter(), etcd.grant_lease(10))
    return catalog


class Told:
    """A voter that notes what it was told to confirm, and may be away."""

    def __init__(self) -> None:
        self.statements: dict[ImageId, Statement] = {}
        self.left = 1000

    def prepare(self, to: Addressee, image: ImageId, known: Statement, wanted: Statement) -> int:
        raise AssertionError("nothing is granted while an arbiter is filled")

    def confirm(self, to: Addressee, image: ImageId, stated: Statement) -> int:
        if not self.left:
            raise ArbiterUnreachable("x", "x:7401", "down")
        self.left -= 1
        self.statements[image] = stated
        return 1


def opened(etcd: MemoryEtcd, catalog: Catalog, name: str) -> Held:
    image = catalog.create_image(ImageName("p", name), 1 << 20)
    return catalog.take_lease(image, gateway="g", holder="9" * 32, etcd_lease=etcd.grant_lease(60))


def test_arbiter_is_known_for_ever_and_votes_while_its_lease_lives(
    etcd: MemoryEtcd, catalog: Catalog
) -> None:
    assert catalog.voting() == {"w"}
    etcd.advance(10)
    assert catalog.voting() == set()
    assert catalog.arbiters() == {"w": arbiter()}
    catalog.announce_arbiter(arbiter(start_counter=2), etcd.grant_lease(10))
    assert catalog.arbiter("w").record.start_counter == 2


def test_arbiter_that_was_emptied_or_rolled_back_is_refused(
    etcd: MemoryEtcd, catalog: Catalog
) -> None:
    with pytest.raises(ForeignArbiter, match="it was emptied or is another's"):
        catalog.announce_arbiter(replace(arbiter(), id="e" * 32), etcd.grant_lease(10))
    catalog.announce_arbiter(arbiter(start_counter=5), etcd.grant_lease(10))
    with pytest.raises(ArbiterRolledBack, match="from its start 4, the cluster saw start 5"):
        catalog.announce_arbiter(arbiter(start_counter=4), etcd.grant_lease(10))


def test_pool_with_an_arbiter_says_which(catalog: Catalog) -> None:
    pool = catalog.create_pool("p", policy=Policy.THIN_ARBITER, arbiter="w")
    assert (pool.arbiter, pool.filled) == ("w", True)
    assert {frozenset(nodes) for nodes in catalog.placement("p").record.sets} == {frozenset(NODES)}
    image = catalog.create_image(ImageName("p", "i"), 1 << 20).record
    assert image.policy is Policy.THIN_ARBITER


def test_pool_of_the_wrong_policy_arbiter_or_hosts_is_refused(
    etcd: MemoryEtcd, catalog: Catalog
) -> None:
    def create(policy: Policy, name: str | None, domain: FailureDomain) -> None:
        catalog.create_pool("p", policy=policy, arbiter=name, failure_domain=domain)

    thin, host = Policy.THIN_ARBITER, FailureDomain.HOST
    with pytest.raises(NoArbiter, match="name one with --arbiter"):
        create(thin, None, host)
    with pytest.raises(ArbiterNotNeeded, match="choose --policy thin-arbiter"):
        create(Policy.REPLICA_3, "w", host)
    with pytest.raises(UnknownArbiter, match="there is no arbiter v"):
        create(thin, "v", host)
    with pytest.raises(TooFewNodes, match="needs 2 nodes on different zones"):
        create(thin, "w", FailureDomain.ZONE)
    catalog.announce_arbiter(arbiter("near", host="host-a"), etcd.grant_lease(10))
    with pytest.raises(ArbiterBesideData, match="run the arbiter on a third host"):
        create(thin, "near", host)
    create(thin, "near", FailureDomain.NODE)
    assert list(catalog.pools()) == ["p"]


def test_replaced_arbiter_is_retired_and_the_new_one_filled(
    etcd: MemoryEtcd, catalog: Catalog
) -> None:
    catalog.create_pool("p", policy=Policy.THIN_ARBITER, arbiter="w")
    held = opened(etcd, catalog, "opened")
    catalog.create_image(ImageName("p", "never-opened"), 1 << 20)
    catalog.announce_arbiter(arbiter("x"), etcd.grant_lease(10))
    told = Told()
    done = replace_arbiter(catalog, "w", "x", lambda _record: told, up=lambda: NODES)
    assert (done.pools, done.images) == (("p",), 1)
    stated = told.statements[held.record.id]
    assert (stated.epoch, stated.generation, stated.in_sync) == (1, 1, (frozenset(NODES),))
    pool = catalog.pool("p").record
    assert (pool.arbiter, pool.filled) == ("x", True)
    with pytest.raises(ArbiterRetired, match="was replaced and votes no more"):
        catalog.arbiter("w")
    with pytest.raises(ArbiterRetired):
        catalog.announce_arbiter(arbiter(start_counter=2), etcd.grant_lease(10))
    with pytest.raises(ArbiterRetired):
        replace_arbiter(catalog, "w", "x", lambda _record: told, up=lambda: NODES)


def test_replacement_that_was_interrupted_goes_on_where_it_was(
    etcd: MemoryEtcd, catalog: Catalog
) -> None:
    catalog.create_pool("p", policy=Policy.THIN_ARBITER, arbiter="w")
    images = {opened(etcd, catalog, f"i{number}").record.id for number in range(3)}
    catalog.announce_arbiter(arbiter("x"), etcd.grant_lease(10))
    told = Told()
    told.left = 1
    with pytest.raises(ArbiterUnreachable):
        replace_arbiter(catalog, "w", "x", lambda _record: told, up=lambda: NODES)
    pool = catalog.pool("p").record
    assert (pool.arbiter, pool.filled) == ("x", False), "neither of both grants anything"
    told.left = 1000
    assert replace_arbiter(catalog, "w", "x", lambda _record: told, up=lambda: NODES).images == 3
    assert told.statements.keys() == images
    assert catalog.pool("p").record.filled


def test_replacement_with_a_node_missing_or_stale_is_refused_unless_forced(
    etcd: MemoryEtcd, catalog: Catalog
) -> None:
    catalog.create_pool("p", policy=Policy.THIN_ARBITER, arbiter="w")
    held = opened(etcd, catalog, "i")
    catalog.announce_arbiter(arbiter("x"), etcd.grant_lease(10))
    told = Told()
    with pytest.raises(ReplaceRefused, match="b of pool p is not running.*or use --force"):
        replace_arbiter(catalog, "w", "x", lambda _record: told, up=lambda: {"a"})
    plan = lose(held.record.membership, {"b"})
    assert isinstance(plan, Change)
    catalog.change_membership(held, plan.membership)
    with pytest.raises(ReplaceRefused, match="b is stale for image p/i"):
        replace_arbiter(catalog, "w", "x", lambda _record: told, up=lambda: NODES)
    assert catalog.pool("p").record.arbiter == "w"
    heard: list[str] = []
    replace_arbiter(
        *(catalog, "w", "x", lambda _record: told),
        up=lambda: {"a"},
        forced=lambda refusal: heard.append(refusal.why),
    )
    assert heard == ["b of pool p is not running", "b is stale for image p/i"]
    assert told.statements[held.record.id].in_sync == (frozenset("a"),)


def test_replacement_by_a_wrong_arbiter_is_refused(etcd: MemoryEtcd, catalog: Catalog) -> None:
    def replace_by(old: str, new: str) -> None:
        replace_arbiter(catalog, old, new, lambda _record: Told(), up=lambda: NODES)

    with pytest.raises(BadReplacement, match="cannot replace itself"):
        replace_by("w", "w")
    with pytest.raises(UnknownArbiter, match="there is no arbiter x"):
        replace_by("w", "x")
    with pytest.raises(UnknownArbiter, match="there is no arbiter v"):
        replace_by("v", "w")
    status = pb.ArbiterStatus(name="x", arbiter_id="e" * 32, cluster_id="d" * 32)
    with pytest.raises(OtherArbiter, match="it is x of cluster dddd"):
        check_candidate(arbiter(), status)


def test_replacement_on_the_host_of_a_data_node_is_refused_also_by_force(
    etcd: MemoryEtcd, catalog: Catalog
) -> None:
    # It was checked where a pool is made alone: losing that host would have lost two of three.
    catalog.create_pool("p", policy=Policy.THIN_ARBITER, arbiter="w")
    catalog.create_pool(
        "q", policy=Policy.THIN_ARBITER, arbiter="w", failure_domain=FailureDomain.NODE
    )
    catalog.announce_arbiter(arbiter("near", host="host-a"), etcd.grant_lease(10))
    for forced in (None, lambda _refusal: None):
        with pytest.raises(ArbiterBesideData, match="run the arbiter on a third host"):
            replace_arbiter(
                *(catalog, "w", "near", lambda _record: Told()), up=lambda: NODES, forced=forced
            )
    assert {pool.arbiter for pool in catalog.pools().values()} == {"w"}
    assert not catalog.arbiters()["w"].retired


def test_pool_made_while_its_arbiter_was_replaced_gets_the_new_one(
    etcd: MemoryEtcd, catalog: Catalog
) -> None:
    # It was made after the pools had been listed. Its arbiter was retired then, granted nothing any
    # more, and could not be replaced since it was replaced already.
    catalog.create_pool("p", policy=Policy.THIN_ARBITER, arbiter="w")
    opened(etcd, catalog, "opened")
    catalog.announce_arbiter(arbiter("x"), etcd.grant_lease(10))
    told = Told()

    def voter(_record: ArbiterRecord) -> Told:
        if not told.statements:
            catalog.create_pool("late", policy=Policy.THIN_ARBITER, arbiter="w")
        return told

    done = replace_arbiter(catalog, "w", "x", voter, up=lambda: NODES)
    assert done.pools == ("p", "late")
    assert (catalog.pool("late").record.arbiter, catalog.pool("late").record.filled) == ("x", True)


def test_pool_that_names_a_retired_arbiter_gets_another(etcd: MemoryEtcd, catalog: Catalog) -> None:
    catalog.create_pool("p", policy=Policy.THIN_ARBITER, arbiter="w")
    catalog.announce_arbiter(arbiter("x"), etcd.grant_lease(10))
    catalog.retire_arbiter("w")
    done = replace_arbiter(catalog, "w", "x", lambda _record: Told(), up=lambda: NODES)
    assert done.pools == ("p",)
    assert catalog.pool("p").record.filled


def test_arbiter_is_not_filled_from_an_etcd_that_lost_history(
    etcd: MemoryEtcd, catalog: Catalog
) -> None:
    catalog.create_pool("p", policy=Policy.THIN_ARBITER, arbiter="w")
    opened(etcd, catalog, "opened")
    catalog.announce_arbiter(arbiter("x"), etcd.grant_lease(10))
    catalog.mark_lost("a", "a test", catalog.stored_cluster())
    told = Told()
    with pytest.raises(RecordsLost):
        replace_arbiter(
            *(catalog, "w", "x", lambda _record: told),
            up=lambda: NODES,
            forced=lambda _refusal: None,
        )
    assert told.statements == {}
    assert catalog.pool("p").record.arbiter == "w"
