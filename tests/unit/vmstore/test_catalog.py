"""The catalog on the fake etcd: what each change makes, refuses, and does when answers are lost."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from etcd import keys
from etcd.errors import EtcdUnavailable, LeaseNotFound, OutcomeUnknown
from etcd.gateways import GatewayRecord
from etcd.interface import Put
from etcd.memory import Fault, MemoryEtcd
from etcd.records import ClusterRecord, LeaseRecord, NodeRecord, PlacementRecord
from shard.errors import BadName, BadSize, BadValue
from shard.ids import ImageId
from shard.membership import Policy, WhenFull
from shard.placement import FailureDomain
from tests.unit.samples import GIB, node_record
from vmstore.catalog import Catalog
from vmstore.errors import (
    ForeignStore,
    ImageExists,
    InUse,
    NoArbiter,
    NoCluster,
    OtherCluster,
    PoolExists,
    RecordChanged,
    ShrinkRefused,
    StoreBehind,
    TooFewNodes,
    UnknownImage,
    UnknownPool,
    UnknownSnapshot,
)
from vmstore.names import ImageName, SnapshotName
from vmstore.snapshot_errors import HasSnapshots
from vmstore.stored import Stored

CLUSTER = "c" * 32
DISK = ImageName("vms", "guests/disk")


def node(number: int, *, host: str | None = None, start_counter: int = 1) -> NodeRecord:
    changes = {"host": host} if host else {}
    return node_record(number, start_counter=start_counter, **changes)


@pytest.fixture
def etcd() -> MemoryEtcd:
    return MemoryEtcd()


@pytest.fixture
def empty(etcd: MemoryEtcd) -> Catalog:
    return Catalog(etcd)


@pytest.fixture
def catalog(etcd: MemoryEtcd, empty: Catalog) -> Catalog:
    """Three nodes and a pool."""
    for number in (1, 2, 3):
        empty.announce_node(node(number), etcd.grant_lease(10))
    empty.create_pool("vms")
    return empty


def test_cluster_is_made_once(empty: Catalog) -> None:
    with pytest.raises(NoCluster):
        empty.cluster()
    assert empty.init_cluster(CLUSTER) == ClusterRecord(id=CLUSTER)
    assert empty.init_cluster(CLUSTER) == ClusterRecord(id=CLUSTER)
    with pytest.raises(OtherCluster, match=f"holds the cluster {CLUSTER}"):
        empty.init_cluster("d" * 32)
    with pytest.raises(OtherCluster):
        empty.cluster("d" * 32)


def test_gateway_is_known_while_its_lease_lives(etcd: MemoryEtcd, empty: Catalog) -> None:
    first, second = etcd.grant_lease(10), etcd.grant_lease(10)
    one = GatewayRecord(name="gateway1", host="h", control="10.0.0.1:7301", holder="a" * 32)
    newer = replace(one, extra={"zone": "z"})
    empty.announce_gateway(one, first)
    empty.announce_gateway(newer, second)
    etcd.revoke_lease(first)
    assert empty.gateways() == {"gateway1": newer}
    etcd.revoke_lease(second)
    assert empty.gateways() == {}
    with pytest.raises(LeaseNotFound):
        empty.announce_gateway(one, first)


def test_node_is_known_for_ever_and_alive_while_its_lease_lives(
    etcd: MemoryEtcd, empty: Catalog
) -> None:
    empty.announce_node(node(1), etcd.grant_lease(10))
    assert empty.nodes() == {"node1": node(1)}
    assert empty.alive()["node1"].start_counter == 1
    etcd.advance(10)
    assert empty.alive() == {}
    assert empty.nodes() == {"node1": node(1)}


def test_node_starting_again_raises_its_counter(etcd: MemoryEtcd, empty: Catalog) -> None:
    empty.announce_node(node(1), etcd.grant_lease(10))
    empty.announce_node(node(1, start_counter=2), etcd.grant_lease(10))
    assert empty.alive()["node1"].start_counter == 2


def test_node_with_an_older_store_is_refused(etcd: MemoryEtcd, empty: Catalog) -> None:
    empty.announce_node(node(1, start_counter=5), etcd.grant_lease(10))
    with pytest.raises(StoreBehind, match="from its start 4, the cluster saw start 5"):
        empty.announce_node(node(1, start_counter=4), etcd.grant_lease(10))


def test_node_with_another_store_is_refused(etcd: MemoryEtcd, empty: Catalog) -> None:
    empty.announce_node(node(1), etcd.grant_lease(10))
    with pytest.raises(ForeignStore, match="node1 is registered with the store"):
        empty.announce_node(replace(node(1), store_id="e" * 32), etcd.grant_lease(10))


def test_node_record_keeps_fields_of_a_newer_program(etcd: MemoryEtcd, empty: Catalog) -> None:
    newer = replace(node(1), extra={"added_later": 1})
    empty.announce_node(newer, etcd.grant_lease(10))
    empty.announce_node(node(1, start_counter=2), etcd.grant_lease(10))
    assert empty.nodes()["node1"].extra == {"added_later": 1}


def test_pool_is_placed_on_the_nodes(catalog: Catalog) -> None:
    pool = catalog.pools()["vms"]
    assert (pool.policy, pool.shard_bytes, pool.replica_sets) == (Policy.REPLICA_3, 4 << 20, 1)
    placement = catalog.placement("vms").record
    assert placement.version == 1
    assert [sorted(members) for members in placement.sets] == [["node1", "node2", "node3"]]


def test_pool_with_a_name_that_exists_is_refused(catalog: Catalog) -> None:
    with pytest.raises(PoolExists, match="the pool vms exists already"):
        catalog.create_pool("vms")


@pytest.mark.parametrize("name", ["", "VMS", "a/b", "x" * 64])
def test_pool_with_a_bad_name_is_refused(catalog: Catalog, name: str) -> None:
    with pytest.raises(BadName):
        catalog.create_pool(name)


def test_pool_is_told_what_to_do_when_full(catalog: Catalog) -> None:
    assert catalog.pools()["vms"].when_full is WhenFull.STALL
    catalog.create_pool("told", when_full=WhenFull.ENOSPC)
    assert catalog.pools()["told"].when_full is WhenFull.ENOSPC
    catalog.set_when_full("vms", WhenFull.ENOSPC)
    catalog.set_when_full("vms", WhenFull.ENOSPC)
    catalog.set_when_full("told", WhenFull.STALL)
    found = {name: pool.when_full for name, pool in catalog.pools().items()}
    assert found == {"vms": WhenFull.ENOSPC, "told": WhenFull.STALL}
    with pytest.raises(UnknownPool):
        catalog.set_when_full("none", WhenFull.STALL)


def test_pool_with_bad_numbers_is_refused(catalog: Catalog) -> None:
    with pytest.raises(BadSize):
        catalog.create_pool("p", shard_bytes=5 << 20)
    for replica_sets in (0, -1, 1025):
        with pytest.raises(BadValue, match="1 to 1024 replica sets"):
            catalog.create_pool("p", replica_sets=replica_sets)
    with pytest.raises(NoArbiter):
        catalog.create_pool("p", policy=Policy.THIN_ARBITER)
    assert list(catalog.pools()) == ["vms"]


def test_pool_whose_records_would_be_too_long_is_refused(etcd: MemoryEtcd, empty: Catalog) -> None:
    # It was made, and no node took the records of its images; or they were taken until a node was
    # lost, when they grew, and writes waited for ever.
    for number in range(1, 4):
        long = replace(node(number), name=f"hv-frankfurt-rack{number}", host=f"host{number}")
        empty.announce_node(long, etcd.grant_lease(20))
    with pytest.raises(BadValue, match=r"1024 replica sets of nodes .* (\d+) would do") as said:
        empty.create_pool("p", replica_sets=1024)
    fewer = int(str(said.value).split(";")[1].split()[0])
    assert fewer > 300
    empty.create_pool("p", replica_sets=fewer)


def test_pool_with_too_few_nodes_up_is_refused(etcd: MemoryEtcd, empty: Catalog) -> None:
    for number in (1, 2):
        empty.announce_node(node(number), etcd.grant_lease(10))
    with pytest.raises(TooFewNodes, match=r"replica-3 needs 3 nodes on different hosts.* 2 up"):
        empty.create_pool("vms")
    empty.announce_node(node(3, host="host2"), etcd.grant_lease(20))
    with pytest.raises(TooFewNodes):
        empty.create_pool("vms")
    empty.create_pool("vms", failure_domain=FailureDomain.NODE)
    etcd.advance(10)
    with pytest.raises(TooFewNodes, match="1 up"):
        empty.create_pool("other")


def test_pool_on_more_nodes_uses_them_all(etcd: MemoryEtcd, empty: Catalog) -> None:
    for number in range(1, 6):
        empty.announce_node(node(number), etcd.grant_lease(10))
    assert empty.create_pool("vms").replica_sets == 5
    sets = empty.placement("vms").record.sets
    assert {name for members in sets for name in members} == set(empty.nodes())


def test_image_is_made_empty_and_clean(catalog: Catalog) -> None:
    image = catalog.create_image(DISK, GIB)
    assert catalog.find(DISK) == image
    record = image.record
    assert (record.epoch, record.holder, record.generation, record.clean) == (0, None, 1, True)
    assert record.placement_key == record.id
    assert record.sets == catalog.placement("vms").record.sets
    assert record.layer_ids == [1]


def test_image_ids_are_random(catalog: Catalog) -> None:
    made = {catalog.create_image(ImageName("vms", str(n)), GIB).record.id for n in range(10)}
    assert len(made) == 10


def test_image_with_a_name_that_exists_is_refused(catalog: Catalog) -> None:
    catalog.create_image(DISK, GIB)
    with pytest.raises(ImageExists, match="the image vms/guests/disk exists already"):
        catalog.create_image(DISK, GIB)
    assert len(catalog.images()) == 1


@pytest.mark.parametrize("size_bytes", [0, -1, 100, (256 << 40) + 512])
def test_image_with_a_bad_size_is_refused(catalog: Catalog, size_bytes: int) -> None:
    with pytest.raises(BadSize):
        catalog.create_image(DISK, size_bytes)
    assert catalog.images() == []


def test_image_in_an_unknown_pool_is_refused(catalog: Catalog) -> None:
    with pytest.raises(UnknownPool, match="there is no pool nope"):
        catalog.create_image(ImageName("nope", "disk"), GIB)
    with pytest.raises(UnknownPool):
        catalog.find(ImageName("nope", "disk"))
    with pytest.raises(UnknownPool):
        catalog.images("nope")
    with pytest.raises(UnknownImage, match="there is no image vms/guests/disk"):
        catalog.find(DISK)


def test_image_is_never_made_under_a_placement_that_moved(etcd: MemoryEtcd) -> None:
    """History: an image created under the old placement while a replica set moves."""

    class Moving(Catalog):
        moving = True

        def placement(self, pool: str) -> Stored[PlacementRecord]:
            found = super().placement(pool)
            if self.moving:
                moved = replace(found.record, version=2)
                etcd.transaction([], [Put(found.key, moved.encode())])
            return found

    catalog = Moving(etcd)
    for number in (1, 2, 3):
        catalog.announce_node(node(number), etcd.grant_lease(10))
    catalog.create_pool("vms")
    with pytest.raises(RecordChanged, match="pool vms"):
        catalog.create_image(DISK, GIB)
    catalog.moving = False
    assert catalog.create_image(DISK, GIB).record.placement_version == 2


def test_image_id_of_a_deleted_image_is_not_used_again(etcd: MemoryEtcd, catalog: Catalog) -> None:
    same = Catalog(etcd, lambda: ImageId("1" * 32))
    same.create_image(DISK, GIB)
    same.delete_image(DISK)
    with pytest.raises(RecordChanged):
        same.create_image(DISK, GIB)


def test_images_are_listed_by_name_and_pool(catalog: Catalog) -> None:
    catalog.create_pool("other")
    for name in (ImageName("vms", "b"), ImageName("other", "z"), ImageName("vms", "a/x")):
        catalog.create_image(name, GIB)
    assert [str(entry.name) for entry in catalog.images()] == ["other/z", "vms/a/x", "vms/b"]
    assert [str(entry.name) for entry in catalog.images("vms")] == ["vms/a/x", "vms/b"]


@pytest.mark.parametrize("fault", [Fault.ANSWER_LOST, Fault.REQUEST_LOST])
def test_image_whose_answer_is_lost_is_made_once(
    etcd: MemoryEtcd, catalog: Catalog, fault: Fault
) -> None:
    etcd.fail_next(fault, fault)
    image = catalog.create_image(DISK, GIB)
    assert catalog.find(DISK) == image


def test_image_whose_outcome_stays_unknown_says_so(etcd: MemoryEtcd, catalog: Catalog) -> None:
    etcd.fail_next(*[Fault.REQUEST_LOST] * 10)
    with pytest.raises(OutcomeUnknown):
        catalog.create_image(DISK, GIB)
    etcd.clear_faults()
    etcd.fail_next(Fault.REQUEST_LOST, Fault.UNAVAILABLE)
    with pytest.raises(OutcomeUnknown):
        catalog.create_image(DISK, GIB)
    etcd.fail_next(Fault.UNAVAILABLE)
    with pytest.raises(EtcdUnavailable):
        catalog.create_image(DISK, GIB)


def test_image_grows_while_nobody_has_it(catalog: Catalog) -> None:
    catalog.create_image(DISK, GIB)
    grown = catalog.grow_image(DISK, 2 * GIB)
    assert catalog.find(DISK) == grown
    assert grown.record.size_bytes == 2 * GIB
    assert catalog.grow_image(DISK, 2 * GIB) == grown


def test_image_is_not_shrunk_by_growing(catalog: Catalog) -> None:
    catalog.create_image(DISK, GIB)
    with pytest.raises(ShrinkRefused, match="use --force"):
        catalog.grow_image(DISK, GIB // 2)


def test_image_deleted_leaves_a_tombstone(etcd: MemoryEtcd, catalog: Catalog) -> None:
    image = catalog.create_image(DISK, GIB).record
    assert catalog.delete_image(DISK).id == image.id
    assert set(catalog.tombstones()) == {image.id}
    assert etcd.get(keys.image(image.id)) is None
    with pytest.raises(UnknownImage):
        catalog.delete_image(DISK)
    catalog.create_image(DISK, GIB)


def test_image_in_use_is_neither_deleted_nor_grown(etcd: MemoryEtcd, catalog: Catalog) -> None:
    image = catalog.create_image(DISK, GIB)
    lease = etcd.grant_lease(10)
    catalog.take_lease(image, gateway="gateway1", holder="a" * 32, etcd_lease=lease)
    with pytest.raises(InUse, match="vms/guests/disk is in use on gateway gateway1"):
        catalog.delete_image(DISK)
    with pytest.raises(InUse):
        catalog.grow_image(DISK, 2 * GIB)
    assert catalog.leases()[image.record.id].gateway == "gateway1"
    etcd.advance(10)
    catalog.delete_image(DISK)


class Interfered(Catalog):
    """Something happens to an image while its delete is being decided."""

    def __init__(self, etcd: MemoryEtcd, happening: Callable[[], object]) -> None:
        super().__init__(etcd)
        self._happening: Callable[[], object] | None = happening

    def lease_of(self, image: ImageId) -> Stored[LeaseRecord] | None:
        found = super().lease_of(image)
        if self._happening is not None:
            happening, self._happening = self._happening, None
            happening()
        return found


def test_image_whose_record_changes_meanwhile_is_deleted(
    etcd: MemoryEtcd, catalog: Catalog
) -> None:
    """History: an import was interrupted, and its gateway let go of the image at that moment."""
    image = catalog.create_image(DISK, GIB)
    closed = replace(image.record, clean=not image.record.clean)
    deleting = Interfered(etcd, lambda: etcd.transaction([], [Put(closed.key, closed.encode())]))
    deleting.delete_image(DISK)
    assert catalog.images() == []


def test_image_that_is_opened_meanwhile_is_not_deleted(etcd: MemoryEtcd, catalog: Catalog) -> None:
    image = catalog.create_image(DISK, GIB)
    lease = etcd.grant_lease(10)
    deleting = Interfered(
        etcd,
        lambda: catalog.take_lease(image, gateway="gateway1", holder="a" * 32, etcd_lease=lease),
    )
    with pytest.raises(InUse):
        deleting.delete_image(DISK)
    assert len(catalog.images()) == 1


def test_another_image_that_took_the_name_is_not_deleted(catalog: Catalog) -> None:
    first = catalog.create_image(DISK, GIB).record.id
    catalog.delete_image(DISK)
    second = catalog.create_image(DISK, GIB).record.id
    with pytest.raises(UnknownImage):
        catalog.delete_image(DISK, only=first)
    assert catalog.find(DISK).record.id == second


def test_image_that_is_only_maintained_is_deleted(etcd: MemoryEtcd, catalog: Catalog) -> None:
    image = catalog.create_image(DISK, GIB)
    lease = etcd.grant_lease(10)
    catalog.take_lease(
        image, gateway="gateway1", holder="a" * 32, etcd_lease=lease, maintenance=True
    )
    catalog.delete_image(DISK)
    assert catalog.leases() == {}


def test_image_that_has_snapshots_is_deleted_only_with_them(
    etcd: MemoryEtcd, catalog: Catalog
) -> None:
    image = catalog.create_image(DISK, GIB)
    snapshot = SnapshotName(DISK, "s")
    with pytest.raises(UnknownSnapshot, match="disk has no snapshot s; `hci snapshot ls"):
        catalog.find_snapshot(snapshot)
    held = catalog.take_lease(
        image, gateway="gateway1", holder="a" * 32, etcd_lease=etcd.grant_lease(10)
    )
    held = catalog.change(held, held.record.with_snapshot("s", 5))
    catalog.release(held, clean=True)
    assert catalog.find_snapshot(snapshot)[1] == catalog.find(DISK).record.snapshots[0]
    with pytest.raises(HasSnapshots, match=r"it has 1 snapshot \(s\); remove it with"):
        catalog.delete_image(DISK)
    assert len(catalog.images()) == 1
    catalog.delete_image(DISK, with_snapshots=True)
    assert catalog.images() == []
