"""One etcd endpoint over gRPC: the only module that knows the etcd3 package and grpc.

It speaks through the protocol stubs of etcd3 rather than its client class: that class drops the
revision of a transaction, cannot compare leases, puts a failed endpoint aside for minutes, and
does not say whether a failed request may have reached etcd. Here every call has a deadline, and
every failure is one of `CallFailed`, `Compacted`, LeaseNotFound, EtcdRefused and ClientClosed.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import etcd3.etcdrpc as pb  # type: ignore[import-untyped]
import grpc
import grpc._common

from etcd.errors import ClientClosed, EtcdRefused, LeaseNotFound
from etcd.interface import (
    Changed,
    Compare,
    Delete,
    KeyAbsent,
    KeyValue,
    LeaseEquals,
    ModRevisionEquals,
    Operation,
    Outcome,
    Put,
    RangeEmpty,
    ValueEquals,
)

grpc._common.MAXIMUM_WAIT_TIMEOUT = 60.0
"""Seconds after which a thread that reads a stream looks whether a signal came. gRPC's own 0.1 is
for Pythons whose locks no signal interrupts; with six watches it woke a gateway every 16 ms."""

MESSAGE_BYTES_MAX = 64 << 20
"""Largest answer taken. gRPC's own limit of 4 MiB is below what a busy watch may send at once."""

PAGE_KEYS = 500
"""Keys read per request, so that answers stay small however many images there are."""

_CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    # A restarted etcd is found again within a second, not after gRPC's two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # How long one attempt may take. A connection needs two round trips, and the slowest line that
    # etcd itself lives with takes a second for each.
    ("grpc.min_reconnect_backoff_ms", 3000),
    # A silent peer ends a watch after 9 s. etcd refuses pings more often than every 5 s.
    ("grpc.keepalive_time_ms", 6000),
    ("grpc.keepalive_timeout_ms", 3000),
    # The daemons talk to addresses of their own network; a proxy would only be in the way.
    ("grpc.enable_http_proxy", 0),
]

_HAS_LEADER = (("hasleader", "true"),)
"""Asks a member that lost its cluster to say so at once."""

_REFUSALS = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.DATA_LOSS,
    }
)

_NOT_CONNECTED = "failed to connect to all addresses"
"""How gRPC names a call that found no connection and so never left."""

_NO_LEADER = "etcdserver: no leader"


class CallFailed(Exception):
    """A call without an answer.

    `reached` is False only where etcd surely did nothing. `is_there` is False where nobody listens:
    else an etcd may be busy, or without a leader, and answer in a moment.
    """

    def __init__(self, detail: str, *, reached: bool, is_there: bool = True) -> None:
        self.detail = detail
        self.reached = reached
        self.is_there = is_there
        super().__init__(detail)


class Compacted(Exception):
    """The revision asked for is no longer kept."""


@dataclass(frozen=True, slots=True)
class Page:
    """Part of a listing; `more` says whether keys follow the last one."""

    revision: int
    items: tuple[KeyValue, ...]
    more: bool


@dataclass(frozen=True, slots=True)
class WatchAnswer:
    """One message of a watch. `created` answers the request; without changes it is a sign of life.

    `revision` is that of the member that answers, at the time it sends.
    """

    revision: int
    created: bool
    changes: tuple[Changed, ...]


class WatchStream:
    """The messages of one watch on one endpoint, until it fails or is cancelled."""

    def __init__(self, endpoint: "Endpoint", prefix: str, from_revision: int) -> None:
        self.endpoint = endpoint
        self._done = threading.Event()
        request = pb.WatchRequest(
            create_request=pb.WatchCreateRequest(
                key=prefix.encode(),
                range_end=_prefix_end(prefix.encode()),
                start_revision=from_revision,
                progress_notify=True,
            )
        )
        self._call = endpoint.open_watch(self._requests(request))

    def cancel(self) -> None:
        """End the stream, also while another thread reads from it."""
        self._done.set()
        self._call.cancel()

    def answers(self) -> Iterator[WatchAnswer]:
        """Yield the messages as they come. Raises CallFailed or Compacted, never ends by itself."""
        try:
            for answer in self._call:
                if answer.compact_revision:
                    raise Compacted
                if answer.canceled:
                    raise CallFailed(f"watch cancelled: {answer.cancel_reason}", reached=True)
                changes = tuple(_changed(event) for event in answer.events)
                yield WatchAnswer(answer.header.revision, answer.created, changes)
        except grpc.RpcError as error:
            self.endpoint.fail(error)
        finally:
            self.cancel()
        raise CallFailed("the watch ended", reached=True)

    def _requests(self, request: Any) -> Iterator[Any]:
        yield request
        self._done.wait()  # The stream ends when its requests do.


class Endpoint:
    """One etcd member, by its address `HOST:PORT`."""

    def __init__(self, address: str, timeout_s: float) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._channel = grpc.insecure_channel(address, options=_CHANNEL_OPTIONS)
        self._kv = pb.KVStub(self._channel)
        self._lease = pb.LeaseStub(self._channel)
        self._watch = pb.WatchStub(self._channel)

    def close(self) -> None:
        """End the connection and every call on it."""
        self._channel.close()

    def get(self, key: str) -> KeyValue | None:
        """Return one key."""
        answer = self._call(self._kv.Range, pb.RangeRequest(key=key.encode()))
        return _key_value(answer.kvs[0]) if answer.kvs else None

    def get_page(self, prefix: str, after: str | None, revision: int) -> Page:
        """Return the first PAGE_KEYS keys of a prefix after key `after`, as of a revision (0: now).

        Raises Compacted where that revision is gone.
        """
        start = prefix.encode() if after is None else after.encode() + b"\0"
        request = pb.RangeRequest(
            key=start,
            range_end=_prefix_end(prefix.encode()),
            revision=revision,
            limit=PAGE_KEYS,
        )
        answer = self._call(self._kv.Range, request)
        items = tuple(_key_value(item) for item in answer.kvs)
        return Page(revision or answer.header.revision, items, answer.more)

    def transaction(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> Outcome:
        """Send one transaction."""
        request = pb.TxnRequest(
            compare=[_compare_message(compare) for compare in compares],
            success=[_operation_message(operation) for operation in operations],
        )
        answer = self._call(self._kv.Txn, request)
        return Outcome(answer.succeeded, answer.header.revision)

    def grant_lease(self, ttl_s: int) -> int:
        """Return a new lease."""
        answer = self._call(self._lease.LeaseGrant, pb.LeaseGrantRequest(TTL=ttl_s))
        return int(answer.ID)

    def refresh_lease(self, lease: int) -> int:
        """Refresh a lease and return its time in seconds.

        A leader that was replaced but has not noticed answers refreshes that its successor never
        sees. So a read that needs a quorum follows, and both must have come in one term of the
        raft leader; else the refresh does not count.
        """
        call = self._start(self._lease.LeaseKeepAlive, iter([pb.LeaseKeepAliveRequest(ID=lease)]))
        try:
            answer = next(iter(call), None)
        except grpc.RpcError as error:
            self.fail(error)
        finally:
            call.cancel()
        if answer is None:
            raise CallFailed("the refresh was not answered", reached=True)
        if answer.TTL <= 0:
            raise LeaseNotFound(lease)
        proof = self._call(self._kv.Range, pb.RangeRequest(key=b"\0", count_only=True))
        if proof.header.raft_term != answer.header.raft_term:
            raise CallFailed("the leader changed during a refresh", reached=True)
        return int(answer.TTL)

    def revoke_lease(self, lease: int) -> None:
        """End a lease; raises LeaseNotFound where there is none."""
        self._call(self._lease.LeaseRevoke, pb.LeaseRevokeRequest(ID=lease), lease=lease)

    def compact(self, revision: int) -> None:
        """Forget the history before a revision; for tests."""
        self._call(self._kv.Compact, pb.CompactionRequest(revision=revision, physical=True))

    def open_watch(self, requests: Iterator[Any]) -> Any:
        """Return the gRPC stream of a watch; `WatchStream` reads it."""
        try:
            return self._watch.Watch(requests, metadata=_HAS_LEADER)
        except ValueError:
            raise ClientClosed from None

    def fail(self, error: grpc.RpcError, lease: int = 0) -> NoReturn:
        """Raise what a gRPC error means."""
        code, detail = error.code(), " ".join((error.details() or "").split())
        if code is grpc.StatusCode.NOT_FOUND and "lease not found" in detail:
            raise LeaseNotFound(lease) from None
        if code is grpc.StatusCode.OUT_OF_RANGE and "compacted" in detail:
            raise Compacted from None
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "too many requests" in detail:
            raise CallFailed(detail, reached=False) from None
        if code in _REFUSALS:
            raise EtcdRefused(self.address, detail) from None
        name = code.name.lower().replace("_", " ")
        if detail.startswith(_NOT_CONNECTED):
            raise CallFailed("no connection", reached=False, is_there=False) from None
        if code is grpc.StatusCode.UNAVAILABLE and detail == _NO_LEADER:
            # Said before a change is looked at: it was asked for with `_HAS_LEADER`.
            raise CallFailed(detail, reached=False) from None
        raise CallFailed(f"{name}: {detail}" if detail else name, reached=True) from None

    def _call(self, method: Any, request: Any, lease: int = 0) -> Any:
        try:
            return method(request, timeout=self._timeout_s, metadata=_HAS_LEADER)
        except grpc.RpcError as error:
            self.fail(error, lease)
        except ValueError:
            # grpc raises it for a call on a closed channel, and for nothing else here.
            raise ClientClosed from None

    def _start(self, method: Any, requests: Iterator[Any]) -> Any:
        try:
            return method(requests, timeout=self._timeout_s, metadata=_HAS_LEADER)
        except ValueError:
            raise ClientClosed from None


def _prefix_end(prefix: bytes) -> bytes:
    """Return the first key after all keys with a prefix, which is no run of 0xff bytes."""
    stripped = prefix.rstrip(b"\xff")
    assert stripped, "a prefix names something"
    return stripped[:-1] + bytes([stripped[-1] + 1])


def _key_value(item: Any) -> KeyValue:
    return KeyValue(_key(item.key), item.value, item.mod_revision, item.lease)


def _changed(event: Any) -> Changed:
    item = event.kv
    if event.type == event.DELETE:
        return Changed(_key(item.key), None, item.mod_revision)
    return Changed(_key(item.key), item.value, item.mod_revision, item.lease)


def _key(key: bytes) -> str:
    # A key that is no UTF-8 is foreign; it is shown, and matches none of ours.
    return key.decode(errors="backslashreplace")


def _compare_message(compare: Compare) -> Any:
    key = compare.key.encode()
    match compare:
        case KeyAbsent():
            return pb.Compare(
                key=key, target=pb.Compare.CREATE, result=pb.Compare.EQUAL, create_revision=0
            )
        case ValueEquals(value=value):
            return pb.Compare(
                key=key, target=pb.Compare.VALUE, result=pb.Compare.EQUAL, value=value
            )
        case ModRevisionEquals(mod_revision=mod_revision):
            assert mod_revision > 0, "a key that was read has a revision"
            return pb.Compare(
                key=key, target=pb.Compare.MOD, result=pb.Compare.EQUAL, mod_revision=mod_revision
            )
        case LeaseEquals(lease=lease):
            assert lease != 0, "the key is bound to a lease"
            return pb.Compare(
                key=key, target=pb.Compare.LEASE, result=pb.Compare.EQUAL, lease=lease
            )
        case RangeEmpty(end=end):
            assert compare.key < end, "a range has room for a key"
            # Of an empty range etcd compares what a key would have that does not exist.
            return pb.Compare(
                key=key,
                range_end=end.encode(),
                target=pb.Compare.CREATE,
                result=pb.Compare.EQUAL,
                create_revision=0,
            )


def _operation_message(operation: Operation) -> Any:
    key = operation.key.encode()
    match operation:
        case Put(value=value, lease=lease):
            return pb.RequestOp(request_put=pb.PutRequest(key=key, value=value, lease=lease))
        case Delete():
            return pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=key))
