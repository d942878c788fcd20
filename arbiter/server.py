"""The arbiter's gRPC service over its votes. What a request gets wrong is INVALID_ARGUMENT."""

from collections.abc import Callable, Iterator
from concurrent import futures
from typing import NoReturn

import grpc

from arbiter import arbiter_pb2 as pb
from arbiter.arbiter_pb2_grpc import ArbiterServicer, add_ArbiterServicer_to_server
from arbiter.errors import ArbiterError
from arbiter.messages import addressee_of, reply_message, statement_of
from arbiter.statement import Statement
from arbiter.voting import Voting
from shard.errors import HciError
from shard.ids import ImageId, image_id

THREADS = 16
"""Requests judged at once. Each waits for its disk; when a node is lost all images ask."""

MESSAGE_BYTES_MAX = 1 << 20
"""A statement of the most replica sets there can be takes a fifth of this."""

# Another process on the same port must be an error, not a partner that takes half of the calls.
_OPTIONS = (("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX))


class CannotListen(ArbiterError):
    """The address is not ours or in use."""

    def __init__(self, address: str) -> None:
        super().__init__(
            f"the arbiter cannot listen at {address}: another program may use that port; "
            "stop it, or change `listen` in the configuration"
        )


def serve(voting: Voting, status: Callable[[], pb.ArbiterStatus], address: str) -> grpc.Server:
    """Return a started server; `status` says how the arbiter is. Raises CannotListen."""
    server = grpc.server(
        futures.ThreadPoolExecutor(THREADS, thread_name_prefix="votes"), options=_OPTIONS
    )
    add_ArbiterServicer_to_server(_Service(voting, status), server)
    try:
        bound = server.add_insecure_port(address)
    except RuntimeError:
        bound = 0
    if not bound:
        raise CannotListen(address)
    server.start()
    return server


class _Service(ArbiterServicer):
    def __init__(self, voting: Voting, status: Callable[[], pb.ArbiterStatus]) -> None:
        self._voting = voting
        self._status = status

    def Prepare(self, request: pb.PrepareRequest, context: grpc.ServicerContext) -> pb.VoteReply:
        image = _image(request.image_id, context)
        known = _statement(request.known, context)
        wanted = _statement(request.wanted, context)
        if (known.epoch, known.holder) != (wanted.epoch, wanted.holder):
            _refuse("a change is wanted by another holder than knows it", context)
        if len(known.in_sync) != len(wanted.in_sync):
            _refuse("a change has another number of replica sets than what it follows", context)
        reply = self._voting.prepare(addressee_of(request.to), image, known, wanted)
        return reply_message(reply)

    def Confirm(self, request: pb.ConfirmRequest, context: grpc.ServicerContext) -> pb.VoteReply:
        image = _image(request.image_id, context)
        stated = _statement(request.stated, context)
        return reply_message(self._voting.confirm(addressee_of(request.to), image, stated))

    def Known(
        self, request: pb.KnownRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.KnownImage]:
        for image, votes in self._voting.known():
            confirmed = [vote.confirmed for vote in votes if vote.confirmed is not None]
            yield pb.KnownImage(
                image_id=image,
                epoch=max(vote.epoch for vote in votes),
                sets=[
                    pb.Confirmed(generation=each.generation, nodes=sorted(each.in_sync))
                    for each in confirmed
                ],
            )

    def Status(self, request: pb.StatusRequest, context: grpc.ServicerContext) -> pb.ArbiterStatus:
        return self._status()


def _image(text: str, context: grpc.ServicerContext) -> ImageId:
    try:
        return image_id(text)
    except HciError as error:
        _refuse(str(error), context)


def _statement(message: pb.Statement, context: grpc.ServicerContext) -> Statement:
    try:
        return statement_of(message)
    except (ValueError, HciError) as error:
        _refuse(str(error), context)


def _refuse(why: str, context: grpc.ServicerContext) -> NoReturn:
    context.abort(grpc.StatusCode.INVALID_ARGUMENT, why)
