"""The control services: errors that a person can act on, from both ends."""

import socket
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from hci import control
from hci import control_pb2 as pb
from hci.config import Endpoint
from hci.control import GatewayClient, NodeClient
from hci.control_pb2_grpc import (
    GatewayControlServicer,
    NodeControlServicer,
    add_GatewayControlServicer_to_server,
    add_NodeControlServicer_to_server,
)
from hci.errors import ConfigError, Refused, Unreachable
from shard.errors import HciError
from shard.ids import image_id
from tests.cluster.etcd_server import free_ports
from vmstore.resizing import RESIZE_LIMIT_S
from vmstore.snapshots import SNAPSHOT_LIMIT_S

IMAGE = image_id("ab" * 16)
SLOW_BYTES = 1 << 20
SHORT_DEADLINE_S = 0.3


class Node(NodeControlServicer):
    def Status(self, request: Any, context: Any) -> pb.NodeStatus:  # noqa: N802
        return pb.NodeStatus(name="node1", state=pb.NodeStatus.STATE_SERVING)

    def Usage(self, request: pb.UsageRequest, context: Any) -> pb.UsageReply:  # noqa: N802
        return pb.UsageReply(physical_bytes=dict.fromkeys(request.image_ids, 4096))

    def Digest(self, request: Any, context: Any) -> Iterator[pb.ShardDigest]:  # noqa: N802
        for shard in range(request.first_shard, request.first_shard + request.shards):
            if shard == 7:
                raise HciError("the disk of node1 failed; replace it")
            yield pb.ShardDigest(shard=shard, blake3=bytes(32))

    def Delete(self, request: Any, context: grpc.ServicerContext) -> pb.DeleteReply:  # noqa: N802
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, "there is no tombstone for it")


class Gateway(GatewayControlServicer):
    def Snapshot(self, request: Any, context: Any) -> pb.SnapshotReply:  # noqa: N802
        time.sleep(3 * SHORT_DEADLINE_S)
        return pb.SnapshotReply(layer=1, held_ms=7)

    def Resize(self, request: Any, context: Any) -> pb.ResizeReply:  # noqa: N802
        if request.size_bytes == SLOW_BYTES:
            time.sleep(3 * SHORT_DEADLINE_S)
            return pb.ResizeReply(size_bytes=SLOW_BYTES, connections_to_renew=2)
        if not request.force:
            raise HciError("vms/a would shrink; use --force")
        raise RuntimeError("a slip")


@pytest.fixture(scope="module")
def address() -> Iterator[Endpoint]:
    endpoint = Endpoint("127.0.0.1", free_ports(1)[0])

    def register(server: grpc.Server) -> None:
        add_NodeControlServicer_to_server(Node(), server)
        add_GatewayControlServicer_to_server(Gateway(), server)

    server = control.server("node1", endpoint, register)
    yield endpoint
    server.stop(None).wait(10)


@pytest.fixture
def node(address: Endpoint) -> Iterator[NodeClient]:
    with NodeClient("node1", address) as client:
        yield client


def test_call_that_works_gives_its_answer(node: NodeClient) -> None:
    assert node.status().name == "node1"
    assert node.usage([IMAGE]) == {IMAGE: 4096}
    assert [shard for shard, _ in node.digests(IMAGE, 2, 3)] == [2, 3, 4]


def test_error_of_a_servicer_arrives_as_its_text(address: Endpoint) -> None:
    with GatewayClient("gateway1", address) as gateway, pytest.raises(Refused) as caught:
        gateway.resize(IMAGE, 512, force=False)
    assert str(caught.value) == "gateway1: vms/a would shrink; use --force"


def test_error_in_a_stream_arrives_after_what_came_before(node: NodeClient) -> None:
    answers = node.digests(IMAGE, 6, 2)
    assert next(answers)[0] == 6
    with pytest.raises(Refused, match="the disk of node1 failed; replace it"):
        next(answers)


def test_status_code_that_a_servicer_chose_is_kept(node: NodeClient) -> None:
    with pytest.raises(Refused, match="node1: there is no tombstone for it"):
        node.delete(IMAGE)


def test_error_that_nobody_foresaw_points_to_the_log(address: Endpoint) -> None:
    with GatewayClient("gateway1", address) as gateway:
        with pytest.raises(Refused, match="an internal error, which its log describes"):
            gateway.resize(IMAGE, 512, force=True)


def test_call_that_the_daemon_does_not_know_says_so(address: Endpoint) -> None:
    with GatewayClient("gateway1", address) as gateway:
        with pytest.raises(Refused, match="older version"):
            gateway.status()


def test_daemon_that_is_not_there_is_unreachable() -> None:
    port = free_ports(1)[0]
    with NodeClient("node1", f"127.0.0.1:{port}") as client, pytest.raises(Unreachable) as caught:
        client.status()
    assert str(caught.value) == (
        f"node1 does not answer at 127.0.0.1:{port}: is `hci node serve` running there? "
        "`hci status` says how to start it"
    )


def test_daemon_that_is_silent_is_given_up_at_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with NodeClient("node1", f"127.0.0.1:{port}", deadline_s=0.3) as client:
            with pytest.raises(Unreachable):
                client.status()


def test_server_on_a_port_in_use_says_which(address: Endpoint) -> None:
    with pytest.raises(ConfigError, match=f"node2 cannot listen at {address}: another program"):
        control.server("node2", address, lambda _server: None)


def test_resize_is_waited_for_longer_than_the_gateway_takes(address: Endpoint) -> None:
    # A shrink that took longer than other calls was reported as failed while it went on.
    with GatewayClient("gateway1", address, deadline_s=SHORT_DEADLINE_S) as gateway:
        assert gateway.resize(IMAGE, SLOW_BYTES, force=True) == 2
    assert control.RESIZE_DEADLINE_S > RESIZE_LIMIT_S


def test_snapshot_is_waited_for_longer_than_the_gateway_takes(address: Endpoint) -> None:
    with GatewayClient("gateway1", address, deadline_s=SHORT_DEADLINE_S) as gateway:
        assert gateway.snapshot(IMAGE, "s").held_ms == 7
    assert control.SNAPSHOT_DEADLINE_S > SNAPSHOT_LIMIT_S
