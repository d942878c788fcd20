"""A session: when its lease certainly lives, and what is said when it does not."""

import threading

import pytest

from etcd.errors import EtcdUnavailable, LeaseNotFound
from etcd.interface import Put
from etcd.lease import Session
from etcd.memory import Fault, MemoryEtcd
from tests.unit.etcd.contract import HANG_S


class SlowEtcd(MemoryEtcd):
    """Answers a refresh 3 seconds after it was sent, on the fake's own clock."""

    def refresh_lease(self, lease: int) -> int:
        ttl_s = super().refresh_lease(lease)
        self.advance(3)
        return ttl_s


class GenerousEtcd(MemoryEtcd):
    """Gives a lease more time than was asked for, as etcd does with short ones."""

    def refresh_lease(self, lease: int) -> int:
        return super().refresh_lease(lease) + 20


def session_of(etcd: MemoryEtcd, lost: list[str] | None = None) -> Session:
    said = [] if lost is None else lost
    return Session(etcd, on_lost=lambda: said.append("lost"), clock_s=lambda: etcd.now_s)


def test_session_counts_its_time_from_sending() -> None:
    etcd = SlowEtcd()
    session = session_of(etcd)
    assert session.remaining_s() == 10
    etcd.advance(4)
    assert session.renew()
    assert session.deadline_s == 14
    assert session.remaining_s() == 7


def test_session_never_counts_on_more_than_it_asked_for() -> None:
    etcd = GenerousEtcd()
    session = session_of(etcd)
    assert session.renew()
    assert session.remaining_s() == 10


def test_session_runs_down_while_etcd_is_away_and_recovers() -> None:
    etcd = MemoryEtcd()
    session = session_of(etcd)
    etcd.advance(9)
    etcd.fail_next(Fault.UNAVAILABLE)
    assert not session.renew()
    assert session.remaining_s() == 1
    assert session.renew()
    assert session.remaining_s() == 10


def test_session_whose_lease_expired_says_so_once() -> None:
    etcd, lost = MemoryEtcd(), list[str]()
    session = session_of(etcd, lost)
    etcd.advance(11)
    assert session.remaining_s() == 0
    assert not session.lost
    with pytest.raises(LeaseNotFound):
        session.renew()
    assert session.lost
    assert lost == ["lost"]
    session.close()


def test_session_reports_each_new_deadline() -> None:
    etcd, deadlines = MemoryEtcd(), list[float]()
    session = Session(
        etcd,
        on_lost=lambda: None,
        on_renewed=deadlines.append,
        clock_s=lambda: etcd.now_s,
    )
    etcd.advance(1)
    session.renew()
    etcd.advance(2)
    session.renew()
    assert deadlines == [11, 13]


def test_session_closed_takes_its_keys_with_it() -> None:
    etcd = MemoryEtcd()
    session = session_of(etcd).start()
    etcd.transaction([], [Put("/hci/alive/n", b"1", session.lease)])
    session.close()
    assert etcd.get("/hci/alive/n") is None
    assert session.remaining_s() == 0


def test_session_closed_while_etcd_is_away_returns() -> None:
    etcd = MemoryEtcd()
    session = session_of(etcd).start()
    etcd.fail_next(Fault.UNAVAILABLE)
    session.close()


def test_session_without_etcd_is_not_made() -> None:
    etcd = MemoryEtcd()
    etcd.fail_next(Fault.UNAVAILABLE)
    with pytest.raises(EtcdUnavailable):
        session_of(etcd)


def test_session_thread_renews_by_itself_and_stops_when_lost() -> None:
    etcd, lost, renewed = MemoryEtcd(), threading.Event(), threading.Semaphore(0)
    session = Session(
        etcd, on_lost=lost.set, on_renewed=lambda _: renewed.release(), ttl_s=1
    ).start()
    for _ in range(3):
        assert renewed.acquire(timeout=HANG_S)
    etcd.revoke_lease(session.lease)
    assert lost.wait(HANG_S)
    session.close()
