"""The fake keeps the contract, and its faults do what they say."""

from collections.abc import Iterator

import pytest

from etcd.errors import EtcdUnavailable, OutcomeUnknown
from etcd.interface import Put
from etcd.memory import HISTORY_MAX, Fault, MemoryEtcd
from tests.unit.etcd.contract import EtcdContract, Notices, put


class MemorySubject:
    def __init__(self) -> None:
        self.etcd = MemoryEtcd()

    def wait(self, seconds: float) -> None:
        self.etcd.advance(seconds)

    def compact(self) -> None:
        self.etcd.compact()


class TestMemoryEtcd(EtcdContract):
    @pytest.fixture
    def subject(self) -> Iterator[MemorySubject]:
        subject = MemorySubject()
        yield subject
        subject.etcd.close()


def test_fault_unavailable_changes_nothing() -> None:
    etcd = MemoryEtcd()
    etcd.fail_next(Fault.UNAVAILABLE, Fault.UNAVAILABLE)
    with pytest.raises(EtcdUnavailable, match="etcd is not reachable at memory"):
        etcd.get("/hci/a")
    with pytest.raises(EtcdUnavailable):
        etcd.transaction([], [Put("/hci/a", b"1")])
    assert etcd.get("/hci/a") is None


def test_fault_answer_lost_makes_the_change() -> None:
    etcd = MemoryEtcd()
    etcd.fail_next(Fault.ANSWER_LOST)
    with pytest.raises(OutcomeUnknown, match="look whether it was made"):
        etcd.transaction([], [Put("/hci/a", b"1")])
    assert etcd.get("/hci/a") is not None


def test_fault_request_lost_makes_no_change() -> None:
    etcd = MemoryEtcd()
    etcd.fail_next(Fault.REQUEST_LOST)
    with pytest.raises(OutcomeUnknown):
        etcd.transaction([], [Put("/hci/a", b"1")])
    assert etcd.get("/hci/a") is None


def test_history_is_bounded_and_an_old_watch_reads_again() -> None:
    etcd, notices = MemoryEtcd(), Notices()
    first = put(etcd, "/hci/a", b"")
    for number in range(HISTORY_MAX + 1):
        put(etcd, "/hci/a", b"%d" % number)
    etcd.watch("/hci/", notices, first)
    notices.wait_for_content({"/hci/a": b"%d" % HISTORY_MAX})
    assert len(notices.all) == 1
