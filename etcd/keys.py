"""Where records stand in etcd.

    /hci/cluster                ClusterRecord     /hci/names/POOL/NAME   NameRecord
    /hci/nodes/NAME             NodeRecord        /hci/images/ID         ImageRecord
    /hci/alive/NAME             AliveRecord       /hci/leases/ID         LeaseRecord
    /hci/pools/NAME             PoolRecord        /hci/tombstones/ID     TombstoneRecord
    /hci/placement/POOL         PlacementRecord   /hci/arbiters/NAME     ArbiterRecord
    /hci/lost                   LostRecord        /hci/voting/NAME       AliveRecord
    /hci/scrubs/ID              ScrubRecord       /hci/imports/ID        ImportRecord
    /hci/gateways/NAME          GatewayRecord     /hci/clones/ID/LAYER/ID CloneRecord

`alive`, `voting`, `gateways` and `leases` keys are bound to etcd leases. An image's NAME is a UTF-8
path and may contain slashes; pools, nodes, arbiters, gateways and ids never do. A clone's key names
its parent, the layer of that which it begins on, in `LAYER_DIGITS` digits, and the clone.
"""

from shard.ids import ImageId

PREFIX = "/hci/"
CLUSTER = PREFIX + "cluster"
LOST = PREFIX + "lost"
NODES = PREFIX + "nodes/"
ALIVE = PREFIX + "alive/"
POOLS = PREFIX + "pools/"
PLACEMENTS = PREFIX + "placement/"
NAMES = PREFIX + "names/"
IMAGES = PREFIX + "images/"
LEASES = PREFIX + "leases/"
TOMBSTONES = PREFIX + "tombstones/"
ARBITERS = PREFIX + "arbiters/"
VOTING = PREFIX + "voting/"
SCRUBS = PREFIX + "scrubs/"
IMPORTS = PREFIX + "imports/"
GATEWAYS = PREFIX + "gateways/"
CLONES = PREFIX + "clones/"

LAYER_DIGITS = 10
"""So that keys of clones are in the order of their layers: ids of layers have 32 bits."""

BOUND = (ALIVE, GATEWAYS, LEASES, VOTING)
"""Prefixes of keys that end with an etcd lease."""


def node(name: str) -> str:
    """Return the key of a node's record."""
    return NODES + name


def alive(name: str) -> str:
    """Return the key that exists while a node runs."""
    return ALIVE + name


def pool(name: str) -> str:
    """Return the key of a pool's record."""
    return POOLS + name


def placement(pool_name: str) -> str:
    """Return the key of a pool's replica sets."""
    return PLACEMENTS + pool_name


def name(pool_name: str, image_name: str) -> str:
    """Return the key that gives an image its name."""
    return f"{NAMES}{pool_name}/{image_name}"


def names(pool_name: str) -> str:
    """Return the prefix of all names of a pool."""
    return f"{NAMES}{pool_name}/"


def split_name(key: str) -> tuple[str, str]:
    """Return (pool, image name) of a key below NAMES."""
    assert key.startswith(NAMES), "the key is a name's"
    pool_name, _, image_name = key.removeprefix(NAMES).partition("/")
    return pool_name, image_name


def image(image_id: ImageId) -> str:
    """Return the key of an image's record."""
    return IMAGES + image_id


def lease(image_id: ImageId) -> str:
    """Return the key that names an image's holder."""
    return LEASES + image_id


def tombstone(image_id: ImageId) -> str:
    """Return the key that says an image was deleted."""
    return TOMBSTONES + image_id


def arbiter(name: str) -> str:
    """Return the key of a thin arbiter's record."""
    return ARBITERS + name


def voting(name: str) -> str:
    """Return the key that exists while a thin arbiter runs."""
    return VOTING + name


def scrub(image_id: ImageId) -> str:
    """Return the key that says how an image's scrub stands."""
    return SCRUBS + image_id


def unfinished_import(image_id: ImageId) -> str:
    """Return the key that says an image is being filled from a file."""
    return IMPORTS + image_id


def gateway(name: str) -> str:
    """Return the key of a gateway's record, which exists while it runs."""
    return GATEWAYS + name


def clone(parent: ImageId, layer: int, image: ImageId) -> str:
    """Return the key that says an image is a clone, of what a layer of its parent holds."""
    return f"{clones_of_layer(parent, layer)}{image}"


def clones(parent: ImageId) -> str:
    """Return the prefix of the keys of all clones of an image."""
    return f"{CLONES}{parent}/"


def clones_of_layer(parent: ImageId, layer: int) -> str:
    """Return the prefix of the keys of the clones that begin on one layer of an image."""
    return f"{clones(parent)}{layer:0{LAYER_DIGITS}}/"


def split_clone(key: str) -> tuple[ImageId, int, ImageId]:
    """Return (parent, layer, clone) of a key below CLONES."""
    assert key.startswith(CLONES), "the key is a clone's"
    parent, layer, image = key.removeprefix(CLONES).split("/")
    return ImageId(parent), int(layer), ImageId(image)


def end_of(prefix: str) -> str:
    """Return the key behind all that begin with a prefix, which ends with a slash."""
    assert prefix.endswith("/"), "0 comes after the slash"
    return prefix[:-1] + "0"
