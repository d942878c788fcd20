"""Errors of the image store: one line each, saying what happened, to what, and what to do.

HciError
├── BadValue, TooFewDomains       wrong input (see `shard.errors`)
├── EtcdError                     cluster state not reachable or not usable (see `etcd.errors`)
└── VmstoreError
    ├── NoCluster                 etcd holds no cluster
    ├── OtherCluster              etcd holds another cluster
    ├── ForeignStore              a node's name stands for another store
    ├── StoreBehind               a node's store is older than what the cluster saw of it
    ├── StoreCopied               two processes run on a store and its copy
    ├── TooFewNodes               the policy needs more nodes than are up
    ├── NoArbiter                 the policy needs an arbiter
    ├── ArbiterNotNeeded          the policy has none
    ├── ArbiterBesideData         the arbiter would be lost together with a node
    ├── UnknownArbiter
    ├── ArbiterRetired            another took its place
    ├── ForeignArbiter            an arbiter's name stands for another durable record
    ├── ArbiterRolledBack         an arbiter's record is older than what the cluster saw of it
    ├── ArbiterNotFilled          a new arbiter does not grant yet
    ├── BadReplacement            an arbiter cannot take the place of that one
    ├── ReplaceRefused            replacing an arbiter now could lose what only it knows
    ├── UnknownPool
    ├── UnknownImage
    ├── UnknownSnapshot
    ├── PoolExists
    ├── ImageExists
    ├── TooManyOrders             a gateway does so many things for commands already
    ├── ShrinkRefused             a smaller size without being forced
    ├── InUse                     a gateway has the image open
    ├── BeingClosed               its last client has left, and its gateway is not done with it
    ├── BeingResized              another change of the image's size is under way
    ├── ClientBarred              the image was another gateway's since this client had it
    ├── …                         of snapshots and rollbacks (see `vmstore.snapshot_errors`)
    ├── RecordsLost               etcd lost history, and nothing goes by it before it is recovered
    ├── RecoveryRefused           what a recovery needs is not there, or is in doubt
    └── Conflict                  a transaction lost against another one
        ├── RecordChanged         read again and decide anew
        │   └── LeaseMoved        by the caller itself, which took a lapsed lease again
        ├── LeaseLost             the lease is another's or gone: stop serving
        └── HistoryLost           etcd is behind what is known: stop, tell a person
"""

from collections.abc import Sequence

from shard.errors import HciError
from shard.ids import ImageId


class VmstoreError(HciError):
    """A request that the image store cannot do."""


class NoCluster(VmstoreError):
    """etcd holds no cluster yet."""

    def __init__(self) -> None:
        super().__init__(
            "etcd holds no cluster; correct the etcd addresses in the configuration, or start the "
            "nodes: the first one makes the cluster. If etcd lost its data: `hci cluster recover`"
        )


class OtherCluster(VmstoreError):
    """etcd holds another cluster than the one configured."""

    def __init__(self, expected: str, found: str) -> None:
        self.expected = expected
        self.found = found
        super().__init__(
            f"etcd holds the cluster {found}, the configuration says {expected}; "
            "correct the cluster id or the etcd addresses"
        )


class ForeignStore(VmstoreError):
    """A node's name is registered with another store."""

    def __init__(self, node: str, registered: str, offered: str) -> None:
        self.node = node
        self.registered = registered
        self.offered = offered
        super().__init__(
            f"node {node} is registered with the store {registered}, but its data_dir holds "
            f"{offered}; check data_dir, or give this store another node name"
        )


class StoreBehind(VmstoreError):
    """A store was set back: the cluster has seen a later start of it.

    `images`: of these no other node in sync is there to make it level again.
    """

    def __init__(
        self, node: str, registered: int, offered: int, images: Sequence[str] = ()
    ) -> None:
        self.node = node
        self.registered = registered
        self.offered = offered
        self.images = images
        what = (
            f"the store of node {node} is from its start {offered}, the cluster saw start "
            f"{registered}: an older copy of the disk was put back"
        )
        if images:
            more = f" and {len(images) - 1} more images" if len(images) > 1 else ""
            what += (
                f", and no other node in sync of image {images[0]}{more} runs, from which it could "
                "be healed; start those first, or use the current disk"
            )
        else:
            what += (
                ". Nothing on it counts: when the etcd lease of its last run is over, within 20 s, "
                "it goes on and is healed; if the current disk is there, stop it and use that"
            )
        super().__init__(what)

    def where_alone(self, images: Sequence[str]) -> "StoreBehind":
        """Return it for images of which no other node in sync is there."""
        return StoreBehind(self.node, self.registered, self.offered, images)


class StoreCopied(VmstoreError):
    """Two processes have the same start of the same store: one disk is a copy of the other."""

    def __init__(self, node: str, start_counter: int) -> None:
        self.node = node
        super().__init__(
            f"another process runs as node {node} with a copy of this store, from its start "
            f"{start_counter} on: end it, and use one disk only, that of the node that ran first; "
            "never copy a data_dir"
        )


class TooFewNodes(VmstoreError):
    """A policy needs more nodes in different failure domains than are up."""

    def __init__(self, policy: str, needed: int, found: int, domain: str) -> None:
        self.policy = policy
        self.needed = needed
        self.found = found
        self.domain = domain
        super().__init__(
            f"{policy} needs {needed} nodes on different {domain}s, and there are {found} up; "
            f"start or add nodes, or choose a narrower failure domain than {domain}"
        )


class NoArbiter(VmstoreError):
    """A policy needs an arbiter and none was named."""

    def __init__(self, policy: str) -> None:
        self.policy = policy
        super().__init__(
            f"{policy} needs an arbiter: name one with --arbiter (`hci arbiter ls` lists them), "
            "or use replica-3"
        )


class ArbiterNotNeeded(VmstoreError):
    """An arbiter was named for a policy that has none."""

    def __init__(self, policy: str, arbiter: str) -> None:
        self.policy = policy
        self.arbiter = arbiter
        super().__init__(
            f"{policy} has no arbiter: leave {arbiter} out, or choose --policy thin-arbiter"
        )


class ArbiterBesideData(VmstoreError):
    """An arbiter on the host of a data node would be lost together with it."""

    def __init__(self, arbiter: str, host: str, node: str) -> None:
        self.arbiter = arbiter
        self.node = node
        super().__init__(
            f"arbiter {arbiter} runs on {host}, as node {node} does: losing that host would lose "
            "two of three votes; run the arbiter on a third host"
        )


class UnknownArbiter(VmstoreError):
    """There is no such arbiter."""

    def __init__(self, arbiter: str) -> None:
        self.arbiter = arbiter
        super().__init__(
            f"there is no arbiter {arbiter}; `hci arbiter ls` lists what there is, "
            "`hci arbiter serve` on its host registers one"
        )


class ArbiterRetired(VmstoreError):
    """An arbiter that was replaced is asked for, or wants to come back."""

    def __init__(self, arbiter: str) -> None:
        self.arbiter = arbiter
        super().__init__(
            f"arbiter {arbiter} was replaced and votes no more; use an empty data_dir and "
            "a new name for an arbiter that takes part"
        )


class ForeignArbiter(VmstoreError):
    """An arbiter's name is registered with another durable record."""

    def __init__(self, arbiter: str, registered: str, offered: str) -> None:
        self.arbiter = arbiter
        super().__init__(
            f"arbiter {arbiter} is registered with the id {registered}, but its data_dir holds "
            f"{offered}: it was emptied or is another's; correct data_dir, or give this one a new "
            "name and use `hci arbiter replace`"
        )


class ArbiterRolledBack(VmstoreError):
    """An arbiter's record was rolled back: its start counter is behind the registered one."""

    def __init__(self, arbiter: str, registered: int, offered: int) -> None:
        self.arbiter = arbiter
        super().__init__(
            f"the record of arbiter {arbiter} is from its start {offered}, the cluster saw start "
            f"{registered}; an older copy of the disk was put back: use the current one, "
            "or `hci arbiter replace`"
        )


class ArbiterNotFilled(VmstoreError):
    """A new arbiter was not told all that etcd holds. Nothing is granted meanwhile."""

    def __init__(self, arbiter: str, pool: str) -> None:
        self.arbiter = arbiter
        super().__init__(
            f"arbiter {arbiter} is not filled for pool {pool} yet; where `hci arbiter replace` "
            "was interrupted, run it again"
        )


class BadReplacement(VmstoreError):
    """An arbiter cannot take the place of another one; the text says why."""


class ReplaceRefused(VmstoreError):
    """Replacing an arbiter is refused without being forced."""

    def __init__(self, arbiter: str, why: str) -> None:
        self.arbiter = arbiter
        self.why = why
        super().__init__(
            f"arbiter {arbiter} is not replaced now: {why}. The new one would learn who is in sync "
            "from etcd alone; if etcd was ever put back to an older copy, writes could be lost. "
            "Bring the nodes back and heal them first, or use --force"
        )


class UnknownPool(VmstoreError):
    """There is no such pool."""

    def __init__(self, pool: str) -> None:
        self.pool = pool
        super().__init__(f"there is no pool {pool}; `hci pool ls` lists what there is")


class UnknownImage(VmstoreError):
    """There is no such image."""

    def __init__(self, image: str) -> None:
        self.image = image
        super().__init__(f"there is no image {image}; `hci image ls` lists what there is")


class UnknownSnapshot(VmstoreError):
    """An image has no such snapshot."""

    def __init__(self, image: str, name: str) -> None:
        self.image = image
        self.name = name
        super().__init__(
            f"{image} has no snapshot {name}; `hci snapshot ls {image}` lists what there is"
        )


class PoolExists(VmstoreError):
    """A pool of this name exists."""

    def __init__(self, pool: str) -> None:
        self.pool = pool
        super().__init__(f"the pool {pool} exists already; choose another name")


class ImageExists(VmstoreError):
    """An image of this name exists."""

    def __init__(self, image: str) -> None:
        self.image = image
        super().__init__(f"the image {image} exists already; remove it or choose another name")


class TooManyOrders(VmstoreError):
    """A gateway does so many things for commands already. The caller tries again later."""

    def __init__(self, orders: int) -> None:
        super().__init__(
            f"the gateway is at {orders} snapshots and changes of size, and begins no more before "
            "one of them is done; try again then"
        )


class ShrinkRefused(VmstoreError):
    """A smaller size was asked for without being forced."""

    def __init__(self, image: str, size_bytes: int, asked_bytes: int) -> None:
        self.image = image
        self.size_bytes = size_bytes
        self.asked_bytes = asked_bytes
        super().__init__(
            f"{image} has {size_bytes} bytes, and {asked_bytes} would cut its end off; "
            "use --force if that data is not needed"
        )


class InUse(VmstoreError):
    """A gateway has the image open."""

    def __init__(self, image: str, gateway: str) -> None:
        self.image = image
        self.gateway = gateway
        super().__init__(
            f"{image} is in use on gateway {gateway}; stop the guest or tool that has it open there"
        )


class BeingClosed(VmstoreError):
    """An image's last client has left, and its gateway has not given it back yet."""

    def __init__(self, image: str) -> None:
        self.image = image
        super().__init__(f"image {image} is being closed; try again")


class BeingResized(VmstoreError):
    """Another change of an image's size is under way."""

    def __init__(self, image: str) -> None:
        self.image = image
        super().__init__(f"{image} is being resized already; try again when that is done")


class ClientBarred(VmstoreError):
    """A process had the image open before another gateway did, and must not have it again."""

    def __init__(self, image: str) -> None:
        self.image = image
        super().__init__(
            f"{image} was open on another gateway after this process had it open here, and what "
            "it may still send must not overwrite that; end this process and start it anew"
        )


class RecordsLost(VmstoreError):
    """etcd is behind what a member knows. Nothing is opened, made or deleted by what it says."""

    def __init__(self, by: str, why: str) -> None:
        self.by = by
        self.why = why
        super().__init__(
            f"etcd lost history: {by} found that {why}; put its latest state back, "
            "or rebuild it from the nodes with `hci cluster recover`"
        )


class RecoveryRefused(VmstoreError):
    """The cluster's records are not rebuilt; the text says why and what to do."""


class Conflict(VmstoreError):
    """A transaction did not go through because what it compares has changed."""


class RecordChanged(Conflict):
    """Something changed since it was read. The caller reads again and decides anew."""

    def __init__(self, what: str) -> None:
        self.what = what
        super().__init__(f"{what} was changed by another program meanwhile; try again")


class LeaseMoved(RecordChanged):
    """The caller's own lease was taken again since, under another etcd lease. It tries again."""

    def __init__(self, image: ImageId) -> None:
        self.image = image
        super().__init__(f"the lease of image {image}")


class LeaseLost(Conflict):
    """The lease of an image is not the caller's any more. It stops serving the image.

    `gateway` is the new holder, or None where the lease merely ended.
    """

    def __init__(self, image: ImageId, gateway: str | None) -> None:
        self.image = image
        self.gateway = gateway
        now = f"gateway {gateway} has it now" if gateway is not None else "it has ended"
        super().__init__(f"the lease of image {image} is lost: {now}; open the image again")


class HistoryLost(Conflict):
    """etcd is behind what the caller knows of an image: it was lost or an old copy put back."""

    def __init__(self, image: ImageId, known: tuple[int, int], found: tuple[int, int]) -> None:
        self.image = image
        self.known = known
        self.found = found
        super().__init__(
            f"etcd has image {image} at epoch {found[0]}, generation {found[1]}, but epoch "
            f"{known[0]}, generation {known[1]} was stored before: etcd lost history; "
            "put its latest state back, or rebuild it from the nodes with `hci cluster recover`"
        )
