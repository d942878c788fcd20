"""The node's daemon, apart from its processes: what it answers and how it registers."""

from types import SimpleNamespace
from typing import Any

from etcd.records import ImageRecord, Layer
from hci import control_pb2 as pb
from hci.node import NodeControl
from shard.digest import UNREADABLE, digest
from shard.ids import ImageId
from shard.membership import Policy

IMAGE = ImageId("cd" * 16)


def record() -> ImageRecord:
    return ImageRecord(
        id=IMAGE,
        pool="vms",
        policy=Policy.REPLICA_3,
        size_bytes=1 << 30,
        shard_bytes=1 << 22,
        placement_key=IMAGE,
        placement_version=1,
        sets=(("node1", "node2", "node3"),),
        layers=(Layer(id=1),),
    )


class Store:
    """A node's store with one damaged shard."""

    def read_shard(self, image: str, layers: list[int], shard: int) -> bytes | None:
        if shard == 1:
            raise RuntimeError("block 3 of shard 1 does not match its checksum")
        return b"content" if shard == 0 else None

    def failure(self) -> str | None:
        return None


def test_digest_of_a_damaged_shard_says_so_and_goes_on() -> None:
    # The check of an image with one damaged shard ended with "an internal error" of that node.
    node: Any = SimpleNamespace(
        engine=Store(),
        own=SimpleNamespace(name="node1"),
        catalog=SimpleNamespace(image=lambda _image: SimpleNamespace(record=record())),
    )
    request = pb.DigestRequest(image_id=IMAGE, first_shard=0, shards=3)
    found = list(NodeControl(node).Digest(request, None))  # type: ignore[arg-type]
    assert [(each.shard, each.blake3) for each in found] == [
        (0, digest([b"content"])),
        (1, UNREADABLE),
    ]
