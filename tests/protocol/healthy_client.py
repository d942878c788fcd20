"""A well-behaved client at work beside those that are not: it has to get on."""

import contextlib
import random
import threading
import time
from collections.abc import Iterator

from tests.protocol.raw_client import DISCONNECT, FLUSH, PATIENCE_S, Client


@contextlib.contextmanager
def healthy_client(uri: str, place: int) -> Iterator[None]:
    """Writes, flushes and reads back 5,000 bytes at `place` meanwhile; fails where it does not.

    It has to have got on after the last of what was done beside it.
    """
    stop = threading.Event()
    rounds = [0]
    failures: list[BaseException] = []

    def work() -> None:
        chance = random.Random(1)
        try:
            with Client(uri).open() as client:
                while not stop.is_set():
                    data = chance.randbytes(5000)
                    client.write(place, data)
                    client.request(FLUSH, 3)
                    assert client.reply() == (0, 3)
                    assert client.read(place, 5000) == data
                    rounds[0] += 1
                client.request(DISCONNECT, 4)
        except (OSError, EOFError, AssertionError) as error:
            failures.append(error)

    def gets_on() -> None:
        """Waits until a round that began after now has ended."""
        goal = rounds[0] + 2
        deadline = time.monotonic() + PATIENCE_S
        while rounds[0] < goal and not failures:
            assert time.monotonic() < deadline, "the healthy client is stuck"
            time.sleep(0.005)
        assert not failures, failures

    thread = threading.Thread(target=work)
    thread.start()
    try:
        gets_on()
        yield
        gets_on()
    finally:
        stop.set()
        thread.join(PATIENCE_S)
