"""The real etcd keeps the contract, and the client rides out what happens to etcd."""

import contextlib
import itertools
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from etcd.client import EtcdClient
from etcd.errors import EtcdUnavailable, OutcomeUnknown
from etcd.interface import Changes, Delete, Put, Reread
from etcd.rpc import Endpoint
from tests.cluster.etcd_server import EtcdServer, free_ports
from tests.unit.etcd.contract import HANG_S, EtcdContract, Notices, put
from tests.waiting import stop


class ServerSubject:
    def __init__(self, server: EtcdServer) -> None:
        self.endpoint = server.endpoint
        self.etcd = EtcdClient([server.endpoint])

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)

    def compact(self) -> None:
        revision = self.etcd.get_prefix("/hci/").revision
        endpoint = Endpoint(self.endpoint, HANG_S)
        endpoint.compact(revision)
        endpoint.close()


class TestEtcdServer(EtcdContract):
    @pytest.fixture
    def subject(self, shared_etcd_server: EtcdServer) -> Iterator[ServerSubject]:
        subject = ServerSubject(shared_etcd_server)
        yield subject
        subject.etcd.close()
        with contextlib.closing(EtcdClient([shared_etcd_server.endpoint])) as cleaner:
            keys = [item.key for item in cleaner.get_prefix("/hci/").items]
            for start in range(0, len(keys), 100):
                cleaner.transaction([], [Delete(key) for key in keys[start : start + 100]])


@contextlib.contextmanager
def client_of(
    *endpoints: str, timeout_s: float = 2.0, patience_s: float = 0.0
) -> Iterator[EtcdClient]:
    client = EtcdClient(endpoints, timeout_s=timeout_s, patience_s=patience_s)
    try:
        yield client
    finally:
        client.close()


@contextlib.contextmanager
def silent_endpoint() -> Iterator[str]:
    """A port that takes connections and never says a word."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def dead_endpoint() -> str:
    return f"127.0.0.1:{free_ports(1)[0]}"


def test_call_with_etcd_down_says_unavailable_in_bounded_time() -> None:
    with client_of(dead_endpoint(), dead_endpoint()) as client:
        begun = time.monotonic()
        with pytest.raises(EtcdUnavailable, match="etcd is not reachable at 127"):
            client.get("/hci/a")
        with pytest.raises(EtcdUnavailable):
            client.transaction([], [Put("/hci/a", b"")])
        with pytest.raises(EtcdUnavailable):
            client.grant_lease(10)
        assert time.monotonic() - begun < HANG_S


def test_patient_client_asks_a_busy_etcd_again_and_a_dead_one_once(
    etcd_server: EtcdServer,
) -> None:
    # A command said that etcd was not reachable where it was slow to answer once.
    with (
        client_of(etcd_server.endpoint, timeout_s=0.5) as hasty,
        client_of(etcd_server.endpoint, patience_s=HANG_S) as patient,
    ):
        put(patient, "/hci/a", b"1")
        pid = etcd_server.pid
        stop(pid)
        going_on = threading.Timer(3, os.kill, [pid, signal.SIGCONT])
        going_on.start()
        with pytest.raises(EtcdUnavailable):
            hasty.get("/hci/a")
        assert patient.get("/hci/a") is not None
        going_on.join()
        etcd_server.kill()
        begun = time.monotonic()
        with pytest.raises(EtcdUnavailable):
            patient.get("/hci/a")
        assert time.monotonic() - begun < HANG_S / 2


def test_call_with_a_dead_endpoint_goes_to_the_next(etcd_server: EtcdServer) -> None:
    with client_of(dead_endpoint(), etcd_server.endpoint) as client:
        assert client.transaction([], [Put("/hci/a", b"1")]).committed
        assert client.get("/hci/a") is not None


def test_read_with_a_silent_endpoint_goes_to_the_next(etcd_server: EtcdServer) -> None:
    with (
        silent_endpoint() as silent,
        client_of(silent, etcd_server.endpoint) as client,
    ):
        assert client.get("/hci/a") is None


def test_change_with_a_silent_endpoint_is_of_unknown_outcome(etcd_server: EtcdServer) -> None:
    with (
        silent_endpoint() as silent,
        client_of(silent, etcd_server.endpoint) as client,
    ):
        with pytest.raises((OutcomeUnknown, EtcdUnavailable)):
            client.transaction([], [Put("/hci/a", b"1")])
        assert client.get("/hci/a") is None
        assert client.transaction([], [Put("/hci/a", b"1")]).committed


def wake_ups(name: str) -> int:
    """Times that threads of this process whose name begins so have gone to sleep."""
    ids = [thread.native_id for thread in threading.enumerate() if thread.name.startswith(name)]
    assert ids, "there is such a thread"
    status = "".join(Path(f"/proc/self/task/{thread}/status").read_text() for thread in ids)
    counts = re.findall(r"^voluntary_ctxt\w+:\s+(\d+)", status, re.MULTILINE)
    return sum(int(count) for count in counts)


def test_watches_sleep_while_nothing_changes(etcd_server: EtcdServer) -> None:
    """gRPC looked ten times a second for each, and a guest's request waits at such a moment."""
    notices = Notices()
    with client_of(etcd_server.endpoint) as client:
        for number in range(4):
            client.watch(f"/hci/watched{number}/", notices)
        time.sleep(1.0)
        before = wake_ups("etcd-watch")
        time.sleep(2.0)
        assert wake_ups("etcd-watch") - before <= 8


def test_watch_with_a_dead_endpoint_goes_to_the_next(etcd_server: EtcdServer) -> None:
    notices = Notices()
    with client_of(dead_endpoint(), etcd_server.endpoint) as client:
        revision = put(client, "/hci/a", b"1")
        with client_of(dead_endpoint(), etcd_server.endpoint) as watcher:
            watcher.watch("/hci/", notices, revision)
            notices.wait_for_content({"/hci/a": b"1"})


def test_restart_of_etcd_loses_nothing_and_watches_resume(etcd_server: EtcdServer) -> None:
    notices = Notices()
    with client_of(etcd_server.endpoint) as client, client_of(etcd_server.endpoint) as other:
        revision = put(client, "/hci/a", b"1")
        watch = client.watch("/hci/", notices, revision + 1)
        put(client, "/hci/a", b"2")
        notices.wait_for_content({"/hci/a": b"2"})
        etcd_server.kill()
        with pytest.raises(EtcdUnavailable):
            client.get("/hci/a")
        etcd_server.start()
        put_when_back(other, "/hci/a", b"3")
        notices.wait_for_content({"/hci/a": b"3"})
        assert all(isinstance(notice, Changes) for notice in notices.all), "nothing was missed"
        watch.cancel()


def test_etcd_that_lost_its_data_makes_watches_read_again(etcd_server: EtcdServer) -> None:
    notices = Notices()
    with client_of(etcd_server.endpoint) as client:
        for number in range(20):
            revision = put(client, "/hci/a", b"%d" % number)
        client.watch("/hci/", notices)
        notices.wait_for_content({"/hci/a": b"19"})
        etcd_server.kill()
        etcd_server.lose_data()
        etcd_server.start()
        notices.wait_for_content({})
        last = notices.all[-1]
        assert isinstance(last, Reread)
        assert last.revision < revision


def test_watch_cancelled_while_etcd_is_down_ends(etcd_server: EtcdServer) -> None:
    notices = Notices()
    with client_of(etcd_server.endpoint) as client:
        watch = client.watch("/hci/", notices)
        notices.wait_for(lambda: len(notices.all) == 1)
        etcd_server.kill()
        cancelling = threading.Thread(target=watch.cancel)
        cancelling.start()
        cancelling.join(HANG_S)
        assert not cancelling.is_alive()


def test_close_leaves_no_thread_behind(etcd_server: EtcdServer) -> None:
    notices = Notices()
    client = EtcdClient([etcd_server.endpoint])
    for _ in range(3):
        client.watch("/hci/", notices)
    notices.wait_for(lambda: len(notices.all) == 3)
    client.close()
    left = [thread.name for thread in threading.enumerate() if "etcd" in thread.name]
    assert left == []


def test_any_one_of_three_members_may_die(three_etcd_members: list[EtcdServer]) -> None:
    notices = Notices()
    with client_of(*(member.endpoint for member in three_etcd_members)) as client:
        lease = client.grant_lease(30)
        put(client, "/hci/leased", b"", lease)
        client.watch("/hci/a", notices)
        notices.wait_for(lambda: len(notices.all) == 1)
        for number, member in enumerate(three_etcd_members):
            member.kill()
            put_when_back(client, "/hci/a", b"%d" % number)
            notices.wait_for_content({"/hci/a": b"%d" % number})
            assert client.refresh_lease(lease) == 30
            member.start()
        values = [change.value for change in notices.changes]
        assert [value for value, _ in itertools.groupby(values)] == [b"0", b"1", b"2"]
        assert client.get("/hci/leased") is not None


def test_two_of_three_members_dead_says_unavailable_in_bounded_time(
    three_etcd_members: list[EtcdServer],
) -> None:
    with client_of(*(member.endpoint for member in three_etcd_members)) as client:
        lease = client.grant_lease(30)
        put(client, "/hci/a", b"1")
        for member in three_etcd_members[:2]:
            member.kill()
        begun = time.monotonic()
        with pytest.raises(EtcdUnavailable):
            client.get("/hci/a")
        with pytest.raises(EtcdUnavailable):
            client.refresh_lease(lease)
        with pytest.raises((EtcdUnavailable, OutcomeUnknown)):
            client.transaction([], [Put("/hci/a", b"2")])
        assert time.monotonic() - begun < HANG_S
        three_etcd_members[0].start()
        put_when_back(client, "/hci/a", b"3")


def put_when_back(client: EtcdClient, key: str, value: bytes) -> None:
    """Put a value, perhaps twice, as soon as etcd takes it."""
    deadline = time.monotonic() + HANG_S
    while time.monotonic() < deadline:
        try:
            put(client, key, value)
            return
        except (EtcdUnavailable, OutcomeUnknown):
            time.sleep(0.05)
    raise AssertionError("etcd did not come back")
