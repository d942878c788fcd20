"""Records as tests need them: valid, small, and alike but for what a test is about."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from etcd.images import ImageRecord, Layer, Snapshot
from etcd.records import NodeRecord
from shard.ids import ImageId
from shard.membership import Policy

NODES = ("node1", "node2", "node3")
MIB = 1 << 20
GIB = 1 << 30

ID = ImageId("0123456789abcdef0123456789abcdef")
HOLDER = "f" * 32
ABC = ("a", "b", "c")

IMAGE = ImageRecord(
    id=ID,
    pool="vms",
    policy=Policy.REPLICA_3,
    size_bytes=10 << 30,
    shard_bytes=4 << 20,
    placement_key=ID,
    placement_version=1,
    sets=(ABC,),
    layers=(Layer(id=2), Layer(id=1)),
    snapshots=(
        Snapshot(
            name="before upgrade",
            layer=1,
            size_bytes=8 << 30,
            created_s=1_700_000_000,
            generation=5,
        ),
    ),
    epoch=3,
    holder=HOLDER,
    generation=7,
    clean=False,
    stale={0: {"b": 6}},
)
"""One that is open, has a snapshot, and a node that is left behind."""


def image_record(image: ImageId, **changes: Any) -> ImageRecord:
    """Return a record of an image on three nodes that nobody has opened yet."""
    fresh = ImageRecord(
        id=image,
        pool="vms",
        policy=Policy.REPLICA_3,
        size_bytes=GIB,
        shard_bytes=4 * MIB,
        placement_key=image,
        placement_version=1,
        sets=(NODES,),
        layers=(Layer(id=1),),
    )
    return replace(fresh, **changes)


def node_record(number: int, **changes: Any) -> NodeRecord:
    """Return the record of `node{number}`, on a host of its own."""
    fresh = NodeRecord(
        name=f"node{number}",
        address=f"10.0.0.{number}:7101",
        control=f"10.0.0.{number}:7201",
        socket=None,
        host=f"host{number}",
        zone="default",
        labels={},
        capacity_bytes=1 << 40,
        store_id=f"{number:032x}",
        start_counter=1,
    )
    return replace(fresh, **changes)
