"""The real etcd: `EtcdClient` keeps the interface of `etcd.interface` over several endpoints.

Calls go to the endpoint that answered last. One that fails is left for the next in turn: a read
is asked again there; a change only where it surely never left, else its outcome is unknown. A
patient client goes round again for a while where an etcd is there, and is busy or has no leader.
"""

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from etcd.errors import ClientClosed, EtcdUnavailable, LeaseNotFound, OutcomeUnknown
from etcd.interface import Compare, KeyValue, Listing, OnNotice, Operation, Outcome
from etcd.rpc import CallFailed, Compacted, Endpoint, WatchStream
from etcd.watch import EtcdWatch

TIMEOUT_S = 2.0
"""For one call to one endpoint. etcd answers in milliseconds; a new leader takes about a second."""

AGAIN_S = 0.2
"""Between two rounds of a patient client."""

LISTING_ATTEMPTS = 5
"""A listing of several pages begins again when history goes between them, minutes apart."""

_T = TypeVar("_T")


class EtcdClient:
    """A client of one etcd cluster; see `etcd.interface.Etcd` for what each method promises.

    `endpoints` are `HOST:PORT` of its members. Nothing is connected before the first call. For
    `patience_s` a call goes round the endpoints again, unless nobody listens at any of them.
    """

    def __init__(
        self, endpoints: Sequence[str], *, timeout_s: float = TIMEOUT_S, patience_s: float = 0.0
    ) -> None:
        assert endpoints, "etcd has at least one endpoint"
        self._addresses = tuple(endpoints)
        self._patience_s = patience_s
        self._endpoints = [Endpoint(address, timeout_s) for address in endpoints]
        self._lock = threading.Lock()
        self._current = 0
        self._closed = False
        self._watches: set[EtcdWatch] = set()

    def get(self, key: str) -> KeyValue | None:
        """Return a key, or None."""
        return self._ask(lambda endpoint: endpoint.get(key))

    def get_prefix(self, prefix: str) -> Listing:
        """Return all keys that begin with `prefix`, as of one revision."""
        for _ in range(LISTING_ATTEMPTS):
            try:
                return self._get_pages(prefix)
            except Compacted:
                continue
        raise EtcdUnavailable(self._addresses, "history was compacted during each listing")

    def transaction(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> Outcome:
        """Apply all operations at once if all compares hold."""
        keys = [operation.key for operation in operations]
        assert len(set(keys)) == len(keys), "no two operations name one key"
        return self._change(lambda endpoint: endpoint.transaction(compares, operations))

    def grant_lease(self, ttl_s: int) -> int:
        """Return the id of a new etcd lease."""
        return self._ask(lambda endpoint: endpoint.grant_lease(ttl_s))

    def refresh_lease(self, lease: int) -> int:
        """Give a lease its whole time again and return it in seconds."""
        return self._ask(lambda endpoint: endpoint.refresh_lease(lease))

    def revoke_lease(self, lease: int) -> None:
        """End a lease and delete its keys."""
        try:
            self._ask(lambda endpoint: endpoint.revoke_lease(lease))
        except LeaseNotFound:
            return

    def watch(
        self, prefix: str, on_notice: OnNotice, from_revision: int | None = None
    ) -> EtcdWatch:
        """Report every change of keys that begin with `prefix` until cancelled."""
        watch = EtcdWatch(self, prefix, on_notice, from_revision, self._forget)
        with self._lock:
            if self._closed:
                raise ClientClosed
            self._watches.add(watch)
        watch.start()
        return watch

    def close(self) -> None:
        """End all watches and connections."""
        with self._lock:
            self._closed = True
            watches = list(self._watches)
        for watch in watches:
            watch.cancel()
        for endpoint in self._endpoints:
            endpoint.close()

    def open_stream(self, prefix: str, from_revision: int) -> WatchStream:
        """Open the stream of a watch on the endpoint in use."""
        with self._lock:
            endpoint = self._endpoints[self._current]
        return WatchStream(endpoint, prefix, from_revision)

    def stream_failed(self, stream: WatchStream) -> None:
        """Leave the endpoint of a stream that failed."""
        self._leave(stream.endpoint)

    def _ask(self, call: Callable[[Endpoint], _T]) -> _T:
        """Make a call that may be made twice, on each endpoint in turn."""
        return self._patiently(call, may_be_repeated=True)

    def _change(self, call: Callable[[Endpoint], _T]) -> _T:
        """Make a call that must not be made twice."""
        return self._patiently(call, may_be_repeated=False)

    def _patiently(self, call: Callable[[Endpoint], _T], *, may_be_repeated: bool) -> _T:
        until_s = time.monotonic() + self._patience_s
        while True:
            failures = []
            for endpoint in self._in_turn():
                try:
                    return call(endpoint)
                except CallFailed as failure:
                    self._leave(endpoint)
                    if failure.reached and not may_be_repeated:
                        raise OutcomeUnknown(endpoint.address, failure.detail) from None
                    failures.append(failure)
            is_there = any(failure.is_there for failure in failures)
            if not is_there or time.monotonic() >= until_s:
                details = dict.fromkeys(failure.detail for failure in failures)
                raise EtcdUnavailable(self._addresses, "; ".join(details))
            time.sleep(AGAIN_S)

    def _get_pages(self, prefix: str) -> Listing:
        items: list[KeyValue] = []
        revision, after = 0, None
        while True:
            page = self._ask(
                partial(Endpoint.get_page, prefix=prefix, after=after, revision=revision)
            )
            items += page.items
            revision = page.revision
            if not page.more:
                return Listing(revision, tuple(items))
            after = page.items[-1].key

    def _in_turn(self) -> list[Endpoint]:
        with self._lock:
            if self._closed:
                raise ClientClosed
            return self._endpoints[self._current :] + self._endpoints[: self._current]

    def _leave(self, endpoint: Endpoint) -> None:
        """Go on to the next endpoint, unless another thread has already."""
        with self._lock:
            if self._endpoints[self._current] is endpoint:
                self._current = (self._current + 1) % len(self._endpoints)

    def _forget(self, watch: EtcdWatch) -> None:
        with self._lock:
            self._watches.discard(watch)
