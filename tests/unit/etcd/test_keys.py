"""Where records stand."""

from etcd import keys
from shard.ids import ImageId

ID = ImageId("0123456789abcdef0123456789abcdef")


def test_keys_are_those_of_the_design() -> None:
    assert keys.CLUSTER == "/hci/cluster"
    assert keys.node("node1") == "/hci/nodes/node1"
    assert keys.alive("node1") == "/hci/alive/node1"
    assert keys.pool("vms") == "/hci/pools/vms"
    assert keys.placement("vms") == "/hci/placement/vms"
    assert keys.name("vms", "a/b é") == "/hci/names/vms/a/b é"
    assert keys.image(ID) == f"/hci/images/{ID}"
    assert keys.lease(ID) == f"/hci/leases/{ID}"
    assert keys.tombstone(ID) == f"/hci/tombstones/{ID}"
    assert keys.arbiter("x") == "/hci/arbiters/x"


def test_split_name_gives_back_pool_and_path() -> None:
    assert keys.split_name(keys.name("vms", "folder/disk 1")) == ("vms", "folder/disk 1")


def test_prefix_of_a_pools_names_is_not_that_of_another_pool() -> None:
    assert not keys.name("vms2", "a").startswith(keys.names("vms"))
