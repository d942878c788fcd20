"""Limits of the gateway: one greedy client is held back, the others go on.

Covers bytes under way of one connection and of all, answers that nobody reads, the number of
connections, handshakes that take too long, and connections that ask for nothing.
"""

import contextlib
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.devcluster import DevCluster
from tests.protocol.raw_client import DISCONNECT, PATIENCE_S, READ, WRITE, Client
from tests.protocol.settings import GATEWAY, gateway_with, metric

MIB = 1 << 20
SIZE_MIB = 64


@pytest.fixture(scope="module")
def limited(shared: DevCluster) -> Iterator[DevCluster]:
    """A cluster whose gateway allows a connection 4 MiB, all of them 8 MiB."""
    with gateway_with(shared, client_bytes_in_flight="4M", bytes_in_flight="8M"):
        yield shared


@pytest.fixture(scope="module")
def uri(limited: DevCluster) -> str:
    """An image whose each MiB says which one it is."""
    limited.create("full", f"{SIZE_MIB}M")
    uri = limited.url("full")
    with Client(uri).open() as client:
        for number in range(SIZE_MIB):
            client.write(number * MIB, bytes([number + 1]) * MIB)
        client.request(DISCONNECT, 9)
    return uri


def ask_for_everything(client: Client) -> None:
    for number in range(SIZE_MIB):
        client.request(READ, number, number * MIB, MIB)


def take_everything(client: Client) -> None:
    for _ in range(SIZE_MIB):
        errno, number = client.reply()
        assert errno == 0
        assert client.receive(MIB) == bytes([number + 1]) * MIB


def settled(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.05)


def kept_bytes(cluster: DevCluster) -> float:
    return metric(cluster, GATEWAY, "hci_gateway_bytes_in_flight")


def test_one_greedy_client_is_held_back_and_loses_nothing(limited: DevCluster, uri: str) -> None:
    with Client(uri).open() as greedy, Client(uri).open() as modest:
        ask_for_everything(greedy)
        settled(lambda: kept_bytes(limited) > 3 * MIB)
        for number in range(SIZE_MIB):
            assert modest.read(number * MIB, 4096) == bytes([number + 1]) * 4096
            assert kept_bytes(limited) <= 5 * MIB
        # A client that asked for all at once and reads late once was never answered the rest.
        take_everything(greedy)
        assert greedy.read(0, 1) == b"\1"
    settled(lambda: kept_bytes(limited) == 0)


def test_many_greedy_clients_share_what_there_is(limited: DevCluster, uri: str) -> None:
    with contextlib.ExitStack() as stack:
        greedy = [stack.enter_context(Client(uri).open()) for _ in range(12)]
        for client in greedy:
            ask_for_everything(client)
        settled(lambda: kept_bytes(limited) > 6 * MIB)
        for _ in range(20):
            assert kept_bytes(limited) <= 9 * MIB
        with ThreadPoolExecutor(len(greedy)) as pool:
            list(pool.map(take_everything, greedy))


def test_client_with_small_requests_goes_on_where_others_have_taken_everything(
    limited: DevCluster, uri: str
) -> None:
    with contextlib.ExitStack() as stack:
        # None of these takes an answer: together they have all that there is, and keep it.
        for _ in range(12):
            ask_for_everything(stack.enter_context(Client(uri).open()))
        settled(lambda: kept_bytes(limited) > 6 * MIB)
        with Client(uri).open() as modest:
            for number in range(SIZE_MIB):
                length = 65_536
                assert modest.read(number * MIB, length) == bytes([number + 1]) * length
                modest.write(number * MIB + MIB - 4096, bytes([number + 1]) * 4096)


def test_clients_that_take_no_answers_are_ended_when_others_wait_for_memory(
    limited: DevCluster, uri: str
) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            ask_for_everything(stack.enter_context(Client(uri).open()))
        settled(lambda: kept_bytes(limited) > 6 * MIB)
        with Client(uri).open() as large:
            large.socket.settimeout(3 * PATIENCE_S)
            assert large.read(0, 2 * MIB)[:1] == b"\1"


def test_clients_that_write_more_than_fits_are_all_served(limited: DevCluster, uri: str) -> None:
    limited.create("written", "64M")
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(Client(limited.url("written")).open()) for _ in range(6)]
        header = struct.pack(">IHHQQI", 0x25609513, 0, WRITE, 1, 0, 16 * MIB)
        for writer in writers:
            writer.send(header, bytes(4096))
        settled(lambda: kept_bytes(limited) >= 16 * MIB)
        assert kept_bytes(limited) <= 24 * MIB

        def write_the_rest(writer: Client) -> tuple[int, int]:
            writer.send(bytes(16 * MIB - 4096))
            return writer.reply()

        with ThreadPoolExecutor(len(writers)) as pool:
            assert set(pool.map(write_the_rest, writers)) == {(0, 1)}
    settled(lambda: kept_bytes(limited) == 0)


def test_a_request_larger_than_all_that_is_allowed_is_served_alone(
    limited: DevCluster, uri: str
) -> None:
    limited.create("large", "64M")
    with Client(limited.url("large")).open() as client:
        client.write(7, b"l" * (32 * MIB))
        assert client.read(7, 32 * MIB) == b"l" * (32 * MIB)


def test_clients_that_vanish_give_back_what_they_had(limited: DevCluster, uri: str) -> None:
    for _ in range(30):
        with Client(uri).open() as client:
            ask_for_everything(client)
    settled(lambda: kept_bytes(limited) == 0)
    with Client(uri).open() as client:
        assert client.read(0, 4 * MIB)[:1] == b"\1"


def test_connections_past_the_limit_are_closed_and_counted(shared: DevCluster) -> None:
    shared.create("few", "1M")
    with gateway_with(shared, clients_max=2):
        uri = shared.url("few")
        with Client(uri).open() as one, Client(uri).open():
            with Client(uri) as third:
                assert third.ended()
            assert one.read(0, 1) == b"\0"
            assert metric(shared, GATEWAY, "hci_gateway_clients_refused_total") >= 1

        def comes_in() -> bool:
            try:
                with Client(uri).open() as client:
                    return client.read(0, 1) == b"\0"
            except (EOFError, ConnectionError):
                return False

        settled(comes_in)


def test_handshake_that_takes_too_long_is_ended_and_nothing_else(shared: DevCluster) -> None:
    shared.create("slow", "1M")
    with gateway_with(shared, handshake_timeout="4s"):
        uri = shared.url("slow")
        with Client(uri).open() as served:
            begun = time.monotonic()
            with Client(uri) as silent:
                assert silent.ended()
            assert 3.5 < time.monotonic() - begun < PATIENCE_S
            assert served.read(0, 1) == b"\0"


def test_connection_that_asks_for_nothing_is_ended_where_that_is_wanted(
    shared: DevCluster,
) -> None:
    shared.create("idle", "1M")
    with gateway_with(shared, idle_timeout="6s"):
        uri = shared.url("idle")
        begun = time.monotonic()
        with Client(uri).open() as busy, Client(uri).open() as idle:
            idle.socket.settimeout(0.5)
            while True:
                assert busy.read(0, 1) == b"\0"
                try:
                    assert idle.socket.recv(1) == b""
                    break
                except TimeoutError:
                    assert time.monotonic() - begun < PATIENCE_S
            assert time.monotonic() - begun > 5.5
            assert busy.read(0, 1) == b"\0"
