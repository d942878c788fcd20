"""A gateway is replaced while clients come and go: its supervisor keeps the listening socket."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable

from tests.devcluster import DevCluster
from tests.protocol.raw_client import DISCONNECT, Client

GATEWAY = "gateway1"
PATIENCE_S = 60
AGAIN_S = 0.5


class Visitor(threading.Thread):
    """Connects, reads and leaves, again and again. One that a gateway let in may be cut off."""

    def __init__(self, uri: str) -> None:
        super().__init__(name="visitor")
        self.uri = uri
        self.visits = 0
        self.cut_off = 0
        self.refused: list[OSError] = []
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.is_set():
            try:
                client = Client(self.uri)
            except OSError as error:
                self.refused.append(error)
                continue
            try:
                with client:
                    client.socket.settimeout(PATIENCE_S)
                    assert client.open().read(0, 1) == b"v"
                    client.request(DISCONNECT, 9)
                    self.visits += 1
            except (EOFError, ConnectionError):
                self.cut_off += 1
                # A gateway that closes its images says this as often as it is asked.
                self.over.wait(AGAIN_S)

    def more_visits(self, count: int) -> None:
        goal, deadline = self.visits + count, time.monotonic() + PATIENCE_S
        while self.visits < goal:
            assert self.is_alive()
            assert time.monotonic() < deadline, "nobody is served any more"
            time.sleep(0.02)


def replaced(cluster: DevCluster, end: Callable[[int], None]) -> None:
    pid = cluster.members()[GATEWAY]["pid"]
    end(pid)
    deadline = time.monotonic() + PATIENCE_S
    while cluster.members()[GATEWAY]["state"] == "running":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    cluster.run(GATEWAY)


def test_no_connection_is_refused_while_a_gateway_is_replaced(cluster: DevCluster) -> None:
    cluster.create("visited", "1M")
    uri = cluster.url("visited")
    with Client(uri).open() as client:
        client.write(0, b"v")
        client.request(DISCONNECT, 9)
    visitors = [Visitor(uri) for _ in range(4)]
    for visitor in visitors:
        visitor.start()
    with contextlib.ExitStack() as stack:
        for visitor in visitors:
            stack.callback(visitor.join)
            stack.callback(visitor.over.set)
        for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGTERM):
            visitors[0].more_visits(5)
            replaced(cluster, lambda pid, number=number: os.kill(pid, number))  # type: ignore[misc]
        visitors[0].more_visits(5)
    assert [visitor.refused for visitor in visitors] == [[], [], [], []]
    assert all(visitor.visits > 5 for visitor in visitors)
    # Each replacement cuts off at most what was open, and those who were told to try again.
    assert sum(visitor.cut_off for visitor in visitors) < 200
