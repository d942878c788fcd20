"""Asking arbiters: calls that end within their deadline, and errors that say what to do.

An arbiter is asked when a replica is lost or healed, so seldom that nothing is kept warm for it.
It may be far away: a call has time for several round trips of half a second. While an arbiter does
not answer one caller at a time finds out whether it does again; the others are told at once that it
did not. So images that wait for it do not hold up those that do not.
"""

import threading
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import grpc

from arbiter import arbiter_pb2 as pb
from arbiter.arbiter_pb2_grpc import ArbiterStub
from arbiter.errors import (
    ArbiterBehind,
    ArbiterFailed,
    ArbiterUnreachable,
    OtherArbiter,
    VoteRefused,
)
from arbiter.exchange import Addressee, Verdict
from arbiter.messages import addressee_message, reply_of, statement_message
from arbiter.statement import Statement
from shard.ids import ImageId

DEADLINE_S = 4.0
"""For one call: a connection and an answer over a line of some hundred milliseconds, a disk sync,
and a lost packet or two. Longer than that is not there."""

CLIENTS_MAX = 16
"""Connections kept by `Arbiters`; a site has one arbiter, and another while it is replaced."""

_OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
)

_NO_ANSWER = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
    }
)

T = TypeVar("T")


class Voter(Protocol):
    """What a holder asks of an arbiter. Each returns how often the image's votes have changed.

    Raises ArbiterUnreachable, ArbiterFailed (try again), OtherArbiter, ArbiterBehind (tell a
    person, try again), VoteRefused (stop).
    """

    def prepare(self, to: Addressee, image: ImageId, known: Statement, wanted: Statement) -> int:
        """Ask for a grant of `wanted`, which follows what etcd holds, `known`."""

    def confirm(self, to: Addressee, image: ImageId, stated: Statement) -> int:
        """Have what etcd holds confirmed."""


class ArbiterClient:
    """Asks one arbiter; a `Voter`. Safe to use from several threads."""

    def __init__(self, name: str, address: str, *, deadline_s: float = DEADLINE_S) -> None:
        self.name = name
        self.address = address
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self._channel: grpc.Channel | None = None
        self._silent = ""
        self._probing = threading.Lock()

    def prepare(self, to: Addressee, image: ImageId, known: Statement, wanted: Statement) -> int:
        """Ask for a grant."""
        request = pb.PrepareRequest(
            to=addressee_message(to),
            image_id=image,
            known=statement_message(known),
            wanted=statement_message(wanted),
        )
        return self._vote(image, lambda stub, limit_s: stub.Prepare(request, timeout=limit_s))

    def confirm(self, to: Addressee, image: ImageId, stated: Statement) -> int:
        """Have what etcd holds confirmed."""
        request = pb.ConfirmRequest(
            to=addressee_message(to), image_id=image, stated=statement_message(stated)
        )
        return self._vote(image, lambda stub, limit_s: stub.Confirm(request, timeout=limit_s))

    def status(self) -> pb.ArbiterStatus:
        """Return who answers and how it is."""
        return self._call(lambda stub, limit_s: stub.Status(pb.StatusRequest(), timeout=limit_s))

    def known(self) -> list[pb.KnownImage]:
        """Return what the arbiter has confirmed, image by image."""
        return self._call(
            lambda stub, limit_s: list(stub.Known(pb.KnownRequest(), timeout=limit_s))
        )

    @property
    def silent(self) -> str:
        """Why it did not answer when it was asked last; empty where it did, or never was."""
        return self._silent

    def close(self) -> None:
        """End the connection; calls under way fail. Another call would connect again."""
        with self._lock:
            channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def _vote(self, image: ImageId, call: Callable[[ArbiterStub, float], pb.VoteReply]) -> int:
        reply = reply_of(self._call(call))
        match reply.verdict:
            case Verdict.GRANTED:
                return reply.changes
            case Verdict.REFUSED:
                assert reply.refusal is not None, "a refusal has a reason"
                raise VoteRefused(self.name, image, reply.refusal)
            case Verdict.OTHER_ARBITER:
                raise OtherArbiter(self.name, self.address, reply.detail)
            case Verdict.BEHIND:
                raise ArbiterBehind(self.name, reply.detail)
            case Verdict.FAILED:
                raise ArbiterFailed(self.name, reply.detail or "it gave no reason")

    def _call(self, call: Callable[[ArbiterStub, float], T]) -> T:
        if not self._silent:
            return self._ask(call)
        if not self._probing.acquire(blocking=False):
            raise ArbiterUnreachable(self.name, self.address, self._silent or "it did not answer")
        try:
            return self._ask(call)
        finally:
            self._probing.release()

    def _ask(self, call: Callable[[ArbiterStub, float], T]) -> T:
        with self._lock:
            if self._channel is None:
                self._channel = grpc.insecure_channel(self.address, options=_OPTIONS)
            channel = self._channel
        try:
            answer = call(ArbiterStub(channel), self._deadline_s)
        except grpc.RpcError as error:
            raise self._translated(error, channel) from error
        except ValueError as error:
            # Another caller found the connection dead, and closed it under this one.
            raise ArbiterUnreachable(self.name, self.address, "the connection ended") from error
        self._silent = ""
        return answer

    def _translated(self, error: Any, channel: grpc.Channel) -> ArbiterUnreachable | ArbiterFailed:
        # What a failed call raises is both an RpcError and a Call, which the stubs do not know.
        code, details = error.code(), str(error.details() or "")
        if code not in _NO_ANSWER:
            return ArbiterFailed(self.name, details or code.name)
        # A connection that lost its peer without a word would be tried for minutes: a new one.
        with self._lock:
            if self._channel is channel:
                self._channel = None
        channel.close()
        late = code is grpc.StatusCode.DEADLINE_EXCEEDED
        self._silent = f"no answer in {self._deadline_s:g} s" if late else "no connection"
        return ArbiterUnreachable(self.name, self.address, self._silent)


class Arbiters:
    """Clients of arbiters by name, made as they are needed, each for the address asked for last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clients: dict[str, ArbiterClient] = {}

    def at(self, name: str, address: str) -> Voter:
        """Return the client of an arbiter; calls under way to another address of it fail."""
        with self._lock:
            client = self._clients.get(name)
            if client is not None and client.address == address:
                return client
            former = client
            if former is None and len(self._clients) >= CLIENTS_MAX:
                former = self._clients.pop(next(iter(self._clients)))
            if former is not None:
                former.close()
            client = self._clients[name] = ArbiterClient(name, address)
            return client

    def answering(self) -> dict[str, bool]:
        """Return, for each arbiter that was asked, whether it answered last."""
        with self._lock:
            return {name: not client.silent for name, client in self._clients.items()}

    def close(self) -> None:
        """End all connections."""
        with self._lock:
            clients, self._clients = list(self._clients.values()), {}
        for client in clients:
            client.close()
