"""The control services' client and server side: typed calls with a deadline and errors to show.

`control.proto` defines the services. Every call here ends within its deadline, and a failure is one
of `hci.errors.ControlError`: Unreachable where nobody knows whether it was done, Refused where the
daemon said why not.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent import futures
from typing import Any, Self, TypeVar

import grpc

from hci import control_pb2 as pb
from hci.config import Endpoint
from hci.control_pb2_grpc import GatewayControlStub, NodeControlStub
from hci.errors import ConfigError, Refused, Undecided, Unreachable
from shard.errors import HciError
from shard.ids import ImageId

T = TypeVar("T")

DEADLINE_S = 5.0
"""For calls that read or change a few records. A daemon syncs its disk at worst meanwhile."""

DIGEST_DEADLINE_S = 600.0
"""For reading a range of shards whole."""

KNOWN_DEADLINE_S = 60.0
"""For all records that a node knows: some MiB."""

RESIZE_DEADLINE_S = 690.0
"""For a resize: above what a gateway lets its caller wait, so that it is the gateway that tells."""

SNAPSHOT_DEADLINE_S = 670.0
"""For a snapshot, its removal, and a rollback to it: the same."""

SERVER_THREADS = 8
"""Calls served at once. They are few and short, digests aside."""

_LOCAL_CHANNEL = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)

# Another process on the same port must be an error, not a partner that takes half of the calls.
_SERVER_OPTIONS = (("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 64 << 20))

_NO_ANSWER = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED})


class _Client:
    """A connection to one daemon. Opened at the first call; close it, or use `with`."""

    _serve: str
    """The command that is such a daemon, for a person who looks for it."""

    def __init__(self, daemon: str, address: Endpoint | str, deadline_s: float) -> None:
        self.daemon = daemon
        self.address = str(address)
        self._deadline_s = deadline_s
        self._channel = grpc.insecure_channel(self.address, options=_LOCAL_CHANNEL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; calls under way fail."""
        self._channel.close()

    def _call(self, method: Callable[..., T], request: Any, deadline_s: float | None = None) -> T:
        try:
            return method(request, timeout=deadline_s or self._deadline_s)
        except grpc.RpcError as error:
            raise self._translated(error) from error

    def _translated(self, error: grpc.RpcError) -> HciError:
        code, details = _code(error), _details(error)
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return Unreachable(self.daemon, self.address, "it is there but busy; try again")
        if code in _NO_ANSWER:
            asked = f"is `{self._serve}` running there? `hci status` says how to start it"
            return Unreachable(self.daemon, self.address, asked)
        if code is grpc.StatusCode.UNIMPLEMENTED:
            details = "it runs an older version, which cannot do this; restart it"
        undecided = code is grpc.StatusCode.ABORTED
        text = f"{self.daemon}: {details or code.name.lower().replace('_', ' ')}"
        return (Undecided if undecided else Refused)(text, self.daemon, self.address)


class NodeClient(_Client):
    """Asks a storage node."""

    _serve = "hci node serve"

    def __init__(
        self, name: str, address: Endpoint | str, *, deadline_s: float = DEADLINE_S
    ) -> None:
        super().__init__(name, address, deadline_s)
        self._stub = NodeControlStub(self._channel)

    def status(self) -> pb.NodeStatus:
        """How the node is, in every state."""
        return self._call(self._stub.Status, pb.NodeStatusRequest())

    def known(self) -> list[pb.KnownPart]:
        """Return all that the node knows of the cluster's records, in parts."""
        try:
            return list(self._stub.Known(pb.KnownRequest(), timeout=KNOWN_DEADLINE_S))
        except grpc.RpcError as error:
            raise self._translated(error) from error

    def usage(self, images: Iterable[ImageId] = ()) -> Mapping[str, int]:
        """Physical bytes per image id; of all images of the node if none is named."""
        request = pb.UsageRequest(image_ids=list(images))
        return dict(self._call(self._stub.Usage, request).physical_bytes)

    def digests(
        self, image: ImageId, first_shard: int, shards: int, layer: int = 0
    ) -> Iterator[tuple[int, bytes]]:
        """Shard index and BLAKE3 digest of each shard in the range that has data on the node.

        Of what is in `layer` and those below it; 0: in all.
        """
        request = pb.DigestRequest(
            image_id=image, first_shard=first_shard, shards=shards, layer=layer
        )
        try:
            for found in self._stub.Digest(request, timeout=DIGEST_DEADLINE_S):
                yield found.shard, found.blake3
        except grpc.RpcError as error:
            raise self._translated(error) from error

    def delete(self, image: ImageId) -> int:
        """Delete the data of an image that has a tombstone; return the bytes freed."""
        return self._call(self._stub.Delete, pb.DeleteRequest(image_id=image)).freed_bytes


class GatewayClient(_Client):
    """Asks a gateway."""

    _serve = "hci gateway serve"

    def __init__(
        self, name: str, address: Endpoint | str, *, deadline_s: float = DEADLINE_S
    ) -> None:
        super().__init__(name, address, deadline_s)
        self._stub = GatewayControlStub(self._channel)

    def status(self) -> pb.GatewayStatus:
        """How the gateway is, and which images it holds."""
        return self._call(self._stub.Status, pb.GatewayStatusRequest())

    def resize(
        self, image: ImageId, size_bytes: int, *, force: bool, reconnect: bool = False
    ) -> int:
        """Change the size of an image that no other gateway holds.

        Return how many connections go by the former size; `reconnect` has them connect anew.
        """
        request = pb.ResizeRequest(
            image_id=image, size_bytes=size_bytes, force=force, reconnect=reconnect
        )
        return self._call(self._stub.Resize, request, RESIZE_DEADLINE_S).connections_to_renew

    def snapshot(self, image: ImageId, name: str) -> pb.SnapshotReply:
        """Take a snapshot of an image that no other gateway holds."""
        request = pb.SnapshotRequest(image_id=image, name=name)
        return self._call(self._stub.Snapshot, request, SNAPSHOT_DEADLINE_S)

    def roll_back(self, image: ImageId, name: str, *, force: bool) -> pb.RollbackReply:
        """Have an image that no client has open hold what its snapshot does."""
        request = pb.RollbackRequest(image_id=image, name=name, force=force)
        return self._call(self._stub.Rollback, request, SNAPSHOT_DEADLINE_S)

    def remove_snapshot(self, image: ImageId, name: str) -> int:
        """Remove a snapshot of an image that no other gateway holds; return its layer."""
        request = pb.RemoveSnapshotRequest(image_id=image, name=name)
        return self._call(self._stub.RemoveSnapshot, request, SNAPSHOT_DEADLINE_S).layer

    def confirm_snapshot(self, image: ImageId, name: str) -> int:
        """Return a snapshot's layer once nothing but its removal can end it."""
        request = pb.ConfirmSnapshotRequest(image_id=image, name=name)
        return self._call(self._stub.ConfirmSnapshot, request, SNAPSHOT_DEADLINE_S).layer


def server(daemon: str, address: Endpoint, register: Callable[[grpc.Server], None]) -> grpc.Server:
    """Return a started server, to which `register` added the servicers.

    Raises ConfigError where it cannot listen.
    A servicer raises HciError for what it cannot do; the caller sees FAILED_PRECONDITION with its
    text. Where another status code is right, it sets that on the context and aborts itself.
    """
    started = grpc.server(
        futures.ThreadPoolExecutor(SERVER_THREADS, thread_name_prefix="control"),
        interceptors=[_Errors()],
        options=_SERVER_OPTIONS,
    )
    register(started)
    try:
        bound = started.add_insecure_port(str(address))
    except RuntimeError:
        bound = 0
    if not bound:
        raise ConfigError(
            f"{daemon} cannot listen at {address}: another program may use that port; "
            "stop it, or change `control` in the configuration"
        )
    started.start()
    return started


class _Errors(grpc.ServerInterceptor):
    """Answers a servicer's HciError with its text, and anything else with what to look at."""

    def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                _answering_stream(handler.unary_stream),
                handler.request_deserializer,
                handler.response_serializer,
            )
        return grpc.unary_unary_rpc_method_handler(
            _answering(handler.unary_unary),
            handler.request_deserializer,
            handler.response_serializer,
        )


def _answering(method: Callable[..., Any]) -> Callable[..., Any]:
    def answer(request: Any, context: grpc.ServicerContext) -> Any:
        try:
            return method(request, context)
        except HciError as error:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except Exception as error:  # noqa: BLE001 - it is logged and answered
            _fail(error, context)

    return answer


def _answering_stream(method: Callable[..., Any]) -> Callable[..., Any]:
    def answer(request: Any, context: grpc.ServicerContext) -> Any:
        try:
            yield from method(request, context)
        except HciError as error:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except Exception as error:  # noqa: BLE001 - it is logged and answered
            _fail(error, context)

    return answer


def _fail(error: Exception, context: grpc.ServicerContext) -> None:
    """Log an error that nobody foresaw, unless it is the servicer's own `abort`."""
    if context.code() is not None:  # type: ignore[attr-defined]
        raise error
    import structlog  # Only a daemon logs; a client starts quicker without.

    structlog.get_logger().exception("control_call_failed")
    context.abort(grpc.StatusCode.INTERNAL, "an internal error, which its log describes")


# What a failed call raises is both an RpcError and a Call, which the stubs hold to be impossible.


def _code(error: Any) -> grpc.StatusCode:
    code = error.code() if hasattr(error, "code") else None
    return code if isinstance(code, grpc.StatusCode) else grpc.StatusCode.UNKNOWN


def _details(error: Any) -> str:
    return str(error.details() or "") if hasattr(error, "details") else str(error)
