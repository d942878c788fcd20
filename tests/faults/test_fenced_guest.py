"""A gateway sleeps past its lease, and its guest tries to come back to an image that went on."""

from __future__ import annotations

import time
from concurrent.futures import Future
from pathlib import Path

import pytest

from tests.devcluster import DevCluster
from tests.faults.load import ReconnectingDisk
from tests.faults.nbd_session import NbdError, NbdSession
from tests.faults.test_silent import open_at, silenced, two
from tests.waiting import until

__all__ = ["two"]

# Time for the old guest's client to reconnect a few times, and to send again what it may.
RECONNECTING_S = 6.0

# Until the first refusal: a hang detector.
REFUSED_S = 60.0


def test_guest_of_a_fenced_gateway_never_writes_again(two: DevCluster, tmp_path: Path) -> None:
    # The gateway killed and forgot the image that it had lost. The other one had closed it by
    # then, so the guest's client reconnected, had it opened anew, and sent its old write again.
    two.create("fenced", "16M")
    with (
        ReconnectingDisk(two.url_at("gateway1", "fenced"), tmp_path) as disk,
        NbdSession(disk.uri, 1) as old,
    ):
        old.call("write", 0, 64, 1)
        old.call("flush")
        with silenced(two, "gateway1"):
            late = old.submit("write", 0, 64, 2)
            with open_at(two, "gateway2", "fenced") as new:
                assert new.call("read", 0, 64) == [1] * 64
                new.call("write", 0, 64, 3)
                new.call("flush")
            await_closed(two, "fenced")
        must_stay_barred(two, old, late)
        # Another process is let in by that gateway, and the guest's still not beside it.
        with open_at(two, "gateway1", "fenced") as another:
            assert another.call("read", 0, 64) == [3] * 64
            must_stay_barred(two, old)
            assert another.call("read", 0, 64) == [3] * 64


def test_guest_of_a_killed_gateway_never_writes_after_another_holder(
    two: DevCluster, tmp_path: Path
) -> None:
    # As above, but the gateway that served the guest was killed: its successor must know of it.
    two.create("replaced", "16M")
    with (
        ReconnectingDisk(two.url_at("gateway1", "replaced"), tmp_path) as disk,
        NbdSession(disk.uri, 1) as old,
    ):
        old.call("write", 0, 64, 1)
        old.call("flush")
        two.kill("gateway1")
        late = old.submit("write", 0, 64, 2)
        with open_at(two, "gateway2", "replaced") as new:
            new.call("write", 0, 64, 3)
            new.call("flush")
        await_closed(two, "replaced")
        two.run("gateway1")
        must_stay_barred(two, old, late)
        with open_at(two, "gateway1", "replaced") as another:
            assert another.call("read", 0, 64) == [3] * 64


def await_closed(cluster: DevCluster, image: str) -> None:
    until("the image is closed", lambda: cluster.info(image)["open_on"] is None)


def must_stay_barred(cluster: DevCluster, old: NbdSession, *late: Future[list[int]]) -> None:
    """No write is answered well: it waits for a reconnect, or ends with an error."""
    log = Path(cluster.members()["gateway1"]["log"])
    deadline = time.monotonic() + REFUSED_S
    writes = [*late]
    while "client_refused" not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()[-2000:]
        # QEMU's client reconnects when it is asked for something, but not for what still came over
        # the connection that it had.
        if all(write.done() for write in writes):
            writes.append(old.submit("write", 0, 64, 4))
        time.sleep(0.2)
    writes.append(old.submit("write", 0, 64, 5))
    time.sleep(RECONNECTING_S)
    for write in writes:
        if write.done():
            with pytest.raises(NbdError):
                write.result()
