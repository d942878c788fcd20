"""How large a simulated cluster is, and what its one image is called."""

from __future__ import annotations

from dataclasses import dataclass

from shard.membership import WhenFull

SHARD_BYTES = 1 << 20
POOL = "vms"
IMAGE = "disk"
IMAGE_NAME = f"{POOL}/{IMAGE}"


@dataclass(frozen=True, slots=True)
class Shape:
    """How large a cluster is."""

    nodes: int = 3
    gateways: int = 2
    replica_sets: int = 1
    shards: int = 3
    arbiter: bool = False
    """Pairs of nodes, and a thin arbiter on a host of its own."""
    log_bytes: int = 1 << 20
    segment_bytes: int = 128 << 10
    """A frame with all blocks that are used must fit into it."""
    when_full: WhenFull = WhenFull.STALL
