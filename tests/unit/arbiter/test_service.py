"""The arbiter over real gRPC: what a holder hears, and how errors reach it."""

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from arbiter import arbiter_pb2 as pb
from arbiter.arbiter_pb2_grpc import ArbiterStub
from arbiter.client import ArbiterClient, Arbiters
from arbiter.errors import (
    ArbiterBehind,
    ArbiterFailed,
    ArbiterUnreachable,
    OtherArbiter,
    VoteRefused,
)
from arbiter.exchange import Addressee, Verdict
from arbiter.record import Record
from arbiter.server import CannotListen, serve
from arbiter.statement import Statement
from arbiter.vote import Refusal
from arbiter.voting import Voting
from shard.ids import ImageId, image_id
from tests.cluster.etcd_server import free_ports

IMAGE = image_id("1" * 32)
OTHER = image_id("2" * 32)
HOLDER = "a" * 32


def stated(generation: int, in_sync: str, *, epoch: int = 1, holder: str = HOLDER) -> Statement:
    return Statement(epoch, holder, generation, (frozenset(in_sync),))


class Running:
    """An arbiter that can be stopped and started again on its record and port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = f"127.0.0.1:{free_ports(1)[0]}"
        self.start()

    def start(self) -> None:
        self.record = Record(self.folder, name="arbiter", cluster="c" * 32)
        status = pb.ArbiterStatus(name="arbiter", arbiter_id=self.record.identity.id)
        self.server = serve(Voting(self.record), lambda: status, self.address)

    def stop(self) -> None:
        self.server.stop(None).wait(10)
        self.record.close()

    def to(self, changes: int = 0) -> Addressee:
        identity = self.record.identity
        return Addressee(identity.id, identity.start_counter, changes)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    arbiter = Running(tmp_path / "arbiter")
    yield arbiter
    arbiter.stop()


@pytest.fixture
def client(running: Running) -> Iterator[ArbiterClient]:
    client = ArbiterClient("arbiter", running.address)
    yield client
    client.close()


def test_votes_are_counted_and_survive_a_restart(running: Running, client: ArbiterClient) -> None:
    assert client.prepare(running.to(), IMAGE, stated(1, "ab"), stated(2, "a")) == 1
    assert client.prepare(running.to(), IMAGE, stated(1, "ab"), stated(2, "a")) == 1, "repeated"
    assert client.confirm(running.to(1), IMAGE, stated(2, "a")) == 2
    running.stop()
    running.start()
    assert client.confirm(running.to(2), IMAGE, stated(2, "a")) == 2
    with pytest.raises(VoteRefused, match="etcd lost history") as caught:
        client.prepare(running.to(), IMAGE, stated(1, "ab", epoch=2), stated(2, "b", epoch=2))
    assert caught.value.refusal is Refusal.OLDER_GENERATION


def test_status_says_who_answers(running: Running, client: ArbiterClient) -> None:
    assert client.status().arbiter_id == running.record.identity.id


def test_request_for_another_arbiter_is_refused(running: Running, client: ArbiterClient) -> None:
    with pytest.raises(OtherArbiter, match="of cluster cccc"):
        client.confirm(Addressee("d" * 32), IMAGE, stated(1, "ab"))


def test_arbiter_of_an_earlier_start_is_refused(running: Running, client: ArbiterClient) -> None:
    with pytest.raises(ArbiterBehind, match="its start 1, start 2 was seen"):
        client.confirm(Addressee(running.record.identity.id, 2), IMAGE, stated(1, "ab"))


def test_arbiter_that_forgot_an_image_is_refused(running: Running, client: ArbiterClient) -> None:
    client.prepare(running.to(), IMAGE, stated(1, "ab"), stated(2, "a"))
    running.record.drop(IMAGE)
    with pytest.raises(ArbiterBehind, match="it has 0 changes of image 1111.*, 1 were seen"):
        client.confirm(running.to(1), IMAGE, stated(2, "a"))


def test_request_that_comes_behind_the_drop_of_its_image_leaves_no_votes(running: Running) -> None:
    # An image was deleted while its heal asked a distant arbiter: the votes that this left nobody
    # would ever have dropped, and to the arbiter they said that etcd had lost the image.
    voting = Voting(running.record)
    assert voting.confirm(running.to(), IMAGE, stated(1, "ab")).verdict is Verdict.GRANTED
    assert voting.drop(IMAGE)
    late = voting.prepare(running.to(), IMAGE, stated(1, "ab"), stated(2, "a"))
    assert (late.verdict, late.detail) == (Verdict.FAILED, f"image {IMAGE} was deleted")
    assert running.record.images() == []
    assert voting.confirm(running.to(), OTHER, stated(1, "ab")).verdict is Verdict.GRANTED


def test_damaged_votes_are_told_and_spare_other_images(
    running: Running, client: ArbiterClient
) -> None:
    client.confirm(running.to(), IMAGE, stated(1, "ab"))
    (running.folder / "votes" / IMAGE).write_bytes(b"torn")
    with pytest.raises(ArbiterFailed, match="is damaged .* and is not believed"):
        client.confirm(running.to(), IMAGE, stated(1, "ab"))
    client.confirm(running.to(), image_id("2" * 32), stated(1, "ab"))


@pytest.mark.parametrize(
    "request_made",
    [
        pb.ConfirmRequest(image_id="../../etc/passwd"),
        pb.ConfirmRequest(image_id=IMAGE),
        pb.ConfirmRequest(
            image_id=IMAGE, stated=pb.Statement(epoch=1, generation=1, holder_id=HOLDER)
        ),
        pb.ConfirmRequest(
            image_id=IMAGE,
            stated=pb.Statement(epoch=1, generation=1, holder_id="x", sets=[pb.InSync(nodes="a")]),
        ),
        pb.ConfirmRequest(
            image_id=IMAGE,
            stated=pb.Statement(
                epoch=1, generation=1, holder_id=HOLDER, sets=[pb.InSync(nodes=["../x"])]
            ),
        ),
    ],
)
def test_malformed_request_is_an_invalid_argument(
    running: Running, request_made: pb.ConfirmRequest
) -> None:
    request_made.to.arbiter_id = running.record.identity.id
    with grpc.insecure_channel(running.address) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            ArbiterStub(channel).Confirm(request_made, timeout=5)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
    assert running.record.images() == []


def test_arbiter_that_is_away_is_unreachable_and_found_again(
    running: Running, client: ArbiterClient
) -> None:
    client.confirm(running.to(), IMAGE, stated(1, "ab"))
    running.stop()
    with pytest.raises(ArbiterUnreachable, match="start it, or replace it"):
        client.confirm(running.to(), IMAGE, stated(1, "ab"))
    running.start()
    deadline = time.monotonic() + 60
    while True:
        try:
            client.confirm(running.to(), IMAGE, stated(1, "ab"))
            break
        except ArbiterUnreachable:
            assert time.monotonic() < deadline


def test_silent_arbiter_is_waited_for_by_one_caller_at_a_time() -> None:
    """Hundred images that wait for it must not fill the workers that others need."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        client = ArbiterClient("arbiter", address, deadline_s=2.0)
        with pytest.raises(ArbiterUnreachable):
            client.status()
        took_s: list[float] = []

        def ask() -> None:
            began_s = time.monotonic()
            with pytest.raises(ArbiterUnreachable):
                client.status()
            took_s.append(time.monotonic() - began_s)

        threads = [threading.Thread(target=ask) for _ in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        client.close()
    # Far from both: a busy machine keeps a thread waiting too.
    assert sum(took > 1.5 for took in took_s) == 1


def test_port_in_use_says_which(running: Running, tmp_path: Path) -> None:
    record = Record(tmp_path / "second", name="second", cluster="c" * 32)
    with pytest.raises(CannotListen, match=running.address):
        serve(Voting(record), pb.ArbiterStatus, running.address)


def test_many_images_are_judged_at_once(running: Running, client: ArbiterClient) -> None:
    images: list[ImageId] = [image_id(f"{number:08x}" + "0" * 24) for number in range(64)]

    def grant(image: ImageId) -> None:
        client.prepare(running.to(), image, stated(1, "ab"), stated(2, "a"))
        client.confirm(running.to(), image, stated(2, "a"))

    threads = [threading.Thread(target=grant, args=(image,)) for image in images]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert running.record.images() == sorted(images)
    assert all(running.record.read(image).changes == 2 for image in images)


def test_clients_are_kept_until_their_arbiter_has_another_address(running: Running) -> None:
    # What it was at its former address was told of an arbiter that answered at the present one.
    arbiters = Arbiters()
    first = arbiters.at("arbiter", running.address)
    assert arbiters.at("arbiter", running.address) is first
    moved = arbiters.at("arbiter", "127.0.0.1:1")
    assert moved is not first
    with pytest.raises(ArbiterUnreachable):
        moved.confirm(running.to(), IMAGE, stated(1, "ab"))
    assert arbiters.answering() == {"arbiter": False}
    back = arbiters.at("arbiter", running.address)
    back.confirm(running.to(), IMAGE, stated(1, "ab"))
    assert arbiters.answering() == {"arbiter": True}
    arbiters.close()


def test_arbiters_that_were_asked_are_known_to_answer_or_not(running: Running) -> None:
    arbiters = Arbiters()
    assert arbiters.answering() == {}
    arbiters.at("there", running.address).confirm(running.to(), IMAGE, stated(1, "ab"))
    with pytest.raises(ArbiterUnreachable):
        arbiters.at("away", "127.0.0.1:1").confirm(running.to(), IMAGE, stated(1, "ab"))
    assert arbiters.answering() == {"there": True, "away": False}
    arbiters.close()
