"""Two gateways that both believe that they hold an image: only one has anything answered.

The first gateway is cut off and goes on running, with its client and its host's own node; the
second one takes the image over when the lease has ended. From then on the first one's reads and
writes end with an error or wait, whatever it still reaches, and so after the line is whole again.
"""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.faults.nbd_session import Answer, NbdError, NbdSession
from tests.faults.test_partition import stale
from tests.faults.test_silent import open_at
from tests.hosts.cluster import HostCluster
from tests.waiting import stop

LEASE_S = 10.0
ERROR_TIMEOUT_S = 60.0
STILL_S = 1.5


def begin(hosts: HostCluster, image: str) -> NbdSession:
    """An image that gateway1's client has written and flushed as version 1."""
    hosts.create(image, "16M")
    session = NbdSession(hosts.url_at("gateway1", image), 1)
    session.call("write", 0, 64, 1)
    session.call("flush")
    return session


def must_not_be_answered(*answers: Answer) -> None:
    for answer in answers:
        if answer.done():
            with pytest.raises(NbdError):
                answer.result()


def must_fail(*answers: Answer) -> None:
    for answer in answers:
        with pytest.raises(NbdError):
            answer.result(timeout=ERROR_TIMEOUT_S)


def test_gateway_alone_with_one_node_answers_nothing_past_its_lease(hosts: HostCluster) -> None:
    """The node of its own host would answer its reads with what others have overwritten."""
    with begin(hosts, "cut-off") as old:
        hosts.isolate(hosts.host("host1"))
        waiting = [old.submit("write", 0, 64, 2)]
        with open_at(hosts, "gateway2", "cut-off") as new:
            waiting += [old.submit("read", 0, 64), old.submit("flush")]
            assert new.call("read", 0, 64) == [1] * 64
            new.call("write", 0, 64, 3)
            new.call("flush")
            waiting += [old.submit("read", 0, 64), old.submit("write", 64, 64, 4)]
            time.sleep(STILL_S)
            must_not_be_answered(*waiting)
            assert stale(hosts, "cut-off") == {"node1"}
            hosts.network.mend()
            must_fail(*waiting, old.submit("read", 0, 64), old.submit("write", 0, 64, 5))
            assert new.call("read", 0, 128) == [3] * 64 + [0] * 64
            hosts.await_health("ok", "healing")
            assert new.call("read", 0, 128) == [3] * 64 + [0] * 64
        hosts.await_health("ok")
    hosts.must_be_equal("cut-off")


def test_gateway_with_etcd_and_one_node_keeps_its_image_and_waits(hosts: HostCluster) -> None:
    others = ["node2", "node3"]
    with begin(hosts, "minority") as old:
        hosts.network.part(["gateway1"], others)
        waiting = old.submit("write", 0, 64, 2)
        time.sleep(LEASE_S + 2)
        assert not waiting.done()
        # One may be left behind; without the other there is no quorum.
        assert len(stale(hosts, "minority")) <= 1
        # Its lease lives, so that nobody else is let in beside it.
        with pytest.raises(NbdError):
            NbdSession(hosts.url_at("gateway2", "minority"), 1)
        hosts.network.mend()
        assert waiting.result(timeout=ERROR_TIMEOUT_S) == []
        assert old.call("read", 0, 64) == [2] * 64
        old.call("flush")
    hosts.must_be_equal("minority")


def test_stopped_gateway_of_a_lost_host_answers_nothing_when_it_goes_on(
    hosts: HostCluster,
) -> None:
    """It was stopped before it noticed anything, its clients' requests in its sockets."""
    with begin(hosts, "stopped") as old:
        pid = int(hosts.members()["gateway1"]["pid"])
        stop(pid)
        late = [old.submit("read", 0, 64), old.submit("write", 0, 64, 2)]
        hosts.isolate(hosts.host("host1"))
        with open_at(hosts, "gateway2", "stopped") as new:
            new.call("write", 0, 64, 3)
            new.call("flush")
            os.kill(pid, signal.SIGCONT)
            time.sleep(STILL_S)
            must_not_be_answered(*late, old.submit("read", 0, 64))
            hosts.network.mend()
            must_fail(*late)
            assert new.call("read", 0, 64) == [3] * 64
        hosts.await_health("ok")
    hosts.must_be_equal("stopped")
