"""What every etcd must keep: one suite, run on the fake and on a real server.

A subclass gives the fixture `subject`. Bounds on waiting are hang detectors, not speed claims.
"""

import threading
import time
from collections.abc import Callable
from typing import Protocol

import pytest

from etcd.errors import ClientClosed, LeaseNotFound
from etcd.interface import (
    Changed,
    Changes,
    Delete,
    Etcd,
    KeyAbsent,
    KeyValue,
    LeaseEquals,
    ModRevisionEquals,
    Notice,
    Put,
    RangeEmpty,
    Reread,
    ValueEquals,
    Watch,
)

HANG_S = 20.0
LEASE_S = 4
"""Short, and longer than a call waits on a busy machine; a real etcd grants 2 s at least."""


class Subject(Protocol):
    """An etcd under test, empty below `/hci/`, and what only its owner can do to it."""

    etcd: Etcd

    def wait(self, seconds: float) -> None:
        """Let time pass for leases."""

    def compact(self) -> None:
        """Forget all history before now."""


class Notices:
    """Collects what a watch delivers, and the keys as they follow from it."""

    def __init__(self) -> None:
        self.all: list[Notice] = []
        self.content: dict[str, bytes] = {}
        self._changed = threading.Condition()

    def __call__(self, notice: Notice) -> None:
        with self._changed:
            self.all.append(notice)
            if isinstance(notice, Reread):
                self.content = {item.key: item.value for item in notice.items}
            else:
                for change in notice.changes:
                    if change.value is None:
                        self.content.pop(change.key, None)
                    else:
                        self.content[change.key] = change.value
            self._changed.notify_all()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, HANG_S), self.all

    def wait_for_content(self, content: dict[str, bytes]) -> None:
        self.wait_for(lambda: self.content == content)

    @property
    def changes(self) -> list[Changed]:
        with self._changed:
            return [
                change
                for notice in self.all
                if isinstance(notice, Changes)
                for change in notice.changes
            ]


def put(etcd: Etcd, key: str, value: bytes, lease: int = 0) -> int:
    outcome = etcd.transaction([], [Put(key, value, lease)])
    assert outcome.committed
    return outcome.revision


class EtcdContract:
    """The suite."""

    def test_get_of_no_key_returns_none(self, subject: Subject) -> None:
        assert subject.etcd.get("/hci/none") is None

    def test_put_then_get_returns_value_and_revision(self, subject: Subject) -> None:
        revision = put(subject.etcd, "/hci/a", b"\x00one")
        assert subject.etcd.get("/hci/a") == KeyValue("/hci/a", b"\x00one", revision, 0)

    def test_get_prefix_returns_keys_in_byte_order_at_one_revision(self, subject: Subject) -> None:
        for key in ("/hci/p/b", "/hci/p/é", "/hci/p/a/x", "/hci/p/\U0001f600", "/hci/q"):
            revision = put(subject.etcd, key, key.encode())
        listing = subject.etcd.get_prefix("/hci/p/")
        assert listing.revision == revision
        assert [item.key for item in listing.items] == [
            "/hci/p/a/x",
            "/hci/p/b",
            "/hci/p/é",
            "/hci/p/\U0001f600",
        ]

    def test_get_prefix_of_more_keys_than_a_page_returns_all(self, subject: Subject) -> None:
        keys = [f"/hci/many/{number:05}" for number in range(1200)]
        for start in range(0, len(keys), 100):
            subject.etcd.transaction([], [Put(key, b"v") for key in keys[start : start + 100]])
        assert [item.key for item in subject.etcd.get_prefix("/hci/many/").items] == keys

    def test_transaction_with_holding_compares_applies_all(self, subject: Subject) -> None:
        etcd = subject.etcd
        revision = put(etcd, "/hci/a", b"1")
        outcome = etcd.transaction(
            [
                ValueEquals("/hci/a", b"1"),
                ModRevisionEquals("/hci/a", revision),
                KeyAbsent("/hci/b"),
            ],
            [Delete("/hci/a"), Put("/hci/b", b"2")],
        )
        assert outcome.committed
        assert outcome.revision == revision + 1
        assert etcd.get("/hci/a") is None
        assert etcd.get("/hci/b") == KeyValue("/hci/b", b"2", outcome.revision, 0)

    @pytest.mark.parametrize(
        "compare",
        [
            KeyAbsent("/hci/a"),
            ValueEquals("/hci/a", b"2"),
            ValueEquals("/hci/none", b""),
            ModRevisionEquals("/hci/a", 1),
            LeaseEquals("/hci/a", 77),
            LeaseEquals("/hci/none", 77),
            RangeEmpty("/hci/a", "/hci/b"),
            RangeEmpty("/hci/", "/hci0"),
        ],
    )
    def test_transaction_with_one_failing_compare_applies_nothing(
        self, subject: Subject, compare: KeyAbsent | ValueEquals
    ) -> None:
        etcd = subject.etcd
        revision = put(etcd, "/hci/a", b"1")
        outcome = etcd.transaction(
            [ValueEquals("/hci/a", b"1"), compare], [Put("/hci/a", b"2"), Put("/hci/b", b"2")]
        )
        assert not outcome.committed
        assert outcome.revision == revision
        assert etcd.get("/hci/a") == KeyValue("/hci/a", b"1", revision, 0)
        assert etcd.get("/hci/b") is None

    @pytest.mark.parametrize(
        "compare",
        [
            RangeEmpty("/hci/a0", "/hci/b"),
            RangeEmpty("/hci/b/", "/hci/b0"),
            RangeEmpty("/hci/", "/hci/a"),
        ],
    )
    def test_transaction_with_an_empty_range_applies(
        self, subject: Subject, compare: RangeEmpty
    ) -> None:
        put(subject.etcd, "/hci/a", b"1")
        put(subject.etcd, "/hci/b0", b"1")
        assert subject.etcd.transaction([compare], [Put("/hci/c", b"2")]).committed

    def test_transaction_that_changes_nothing_keeps_the_revision(self, subject: Subject) -> None:
        revision = put(subject.etcd, "/hci/a", b"1")
        outcome = subject.etcd.transaction([], [Delete("/hci/none")])
        assert (outcome.committed, outcome.revision) == (True, revision)

    def test_put_without_lease_unbinds_the_key(self, subject: Subject) -> None:
        etcd = subject.etcd
        lease = etcd.grant_lease(60)
        put(etcd, "/hci/a", b"1", lease)
        assert etcd.transaction([LeaseEquals("/hci/a", lease)], []).committed
        put(etcd, "/hci/a", b"2")
        etcd.revoke_lease(lease)
        item = etcd.get("/hci/a")
        assert item is not None
        assert item.lease == 0

    def test_lease_not_refreshed_takes_its_keys_with_it(self, subject: Subject) -> None:
        etcd = subject.etcd
        lease = etcd.grant_lease(LEASE_S)
        put(etcd, "/hci/a", b"1", lease)
        put(etcd, "/hci/b", b"1")
        wait_until(subject, lambda: etcd.get("/hci/a") is None)
        assert etcd.get("/hci/b") is not None
        with pytest.raises(LeaseNotFound):
            etcd.refresh_lease(lease)

    def test_lease_refreshed_outlives_its_time(self, subject: Subject) -> None:
        etcd = subject.etcd
        lease = etcd.grant_lease(LEASE_S)
        put(etcd, "/hci/a", b"1", lease)
        for _ in range(5):
            subject.wait(LEASE_S / 4)
            assert etcd.refresh_lease(lease) == LEASE_S
        assert etcd.get("/hci/a") is not None

    def test_lease_revoked_takes_its_keys_at_once(self, subject: Subject) -> None:
        etcd = subject.etcd
        lease = etcd.grant_lease(60)
        put(etcd, "/hci/a", b"1", lease)
        etcd.revoke_lease(lease)
        assert etcd.get("/hci/a") is None
        with pytest.raises(LeaseNotFound):
            etcd.refresh_lease(lease)
        etcd.revoke_lease(lease)

    def test_put_with_a_lease_that_is_gone_changes_nothing(self, subject: Subject) -> None:
        etcd = subject.etcd
        lease = etcd.grant_lease(60)
        etcd.revoke_lease(lease)
        with pytest.raises(LeaseNotFound):
            etcd.transaction([], [Put("/hci/a", b"1"), Put("/hci/b", b"1", lease)])
        assert etcd.get("/hci/a") is None

    def test_watch_from_now_begins_with_what_is_there(self, subject: Subject) -> None:
        etcd, notices = subject.etcd, Notices()
        revision = put(etcd, "/hci/w/a", b"1")
        watch = etcd.watch("/hci/w/", notices)
        notices.wait_for_content({"/hci/w/a": b"1"})
        assert notices.all == [
            Reread(revision, (KeyValue("/hci/w/a", b"1", revision, 0),)),
        ]
        put(etcd, "/hci/w/b", b"2")
        etcd.transaction([], [Delete("/hci/w/a")])
        notices.wait_for_content({"/hci/w/b": b"2"})
        watch.cancel()

    def test_watch_reports_each_change_once_in_order(self, subject: Subject) -> None:
        etcd, notices = subject.etcd, Notices()
        lease = etcd.grant_lease(60)
        first = put(etcd, "/hci/w/a", b"1")
        watch = etcd.watch("/hci/w/", notices, first + 1)
        put(etcd, "/hci/other", b"x")
        put(etcd, "/hci/w/a", b"2", lease)
        etcd.transaction([], [Put("/hci/w/b", b"3"), Delete("/hci/w/a"), Put("/hci/other", b"y")])
        notices.wait_for(lambda: len(notices.changes) == 3)
        assert notices.changes[0] == Changed("/hci/w/a", b"2", first + 2, lease)
        assert sorted(notices.changes[1:], key=lambda change: change.key) == [
            Changed("/hci/w/a", None, first + 3),
            Changed("/hci/w/b", b"3", first + 3),
        ]
        assert all(isinstance(notice, Changes) for notice in notices.all)
        assert notices.all[-1].revision == first + 3
        watch.cancel()

    def test_watch_from_the_past_reports_what_was_missed(self, subject: Subject) -> None:
        etcd, notices = subject.etcd, Notices()
        first = put(etcd, "/hci/w/a", b"1")
        put(etcd, "/hci/w/a", b"2")
        watch = etcd.watch("/hci/w/", notices, first)
        notices.wait_for(lambda: len(notices.changes) == 2)
        assert [change.value for change in notices.changes] == [b"1", b"2"]
        watch.cancel()

    def test_watch_of_compacted_history_reads_all_again(self, subject: Subject) -> None:
        etcd, notices = subject.etcd, Notices()
        first = put(etcd, "/hci/w/a", b"1")
        for number in range(5):
            put(etcd, "/hci/w/a", b"%d" % number)
        subject.compact()
        watch = etcd.watch("/hci/w/", notices, first)
        notices.wait_for_content({"/hci/w/a": b"4"})
        assert isinstance(notices.all[0], Reread)
        put(etcd, "/hci/w/a", b"after")
        notices.wait_for_content({"/hci/w/a": b"after"})
        watch.cancel()

    def test_watch_from_a_future_that_etcd_lost_reads_all_again(self, subject: Subject) -> None:
        """A restored etcd is behind what its clients knew."""
        etcd, notices = subject.etcd, Notices()
        revision = put(etcd, "/hci/w/a", b"1")
        watch = etcd.watch("/hci/w/", notices, revision + 1000)
        notices.wait_for_content({"/hci/w/a": b"1"})
        assert isinstance(notices.all[0], Reread)
        assert notices.all[0].revision == revision
        watch.cancel()

    def test_watch_sees_keys_go_with_their_lease(self, subject: Subject) -> None:
        etcd, notices = subject.etcd, Notices()
        watch = etcd.watch("/hci/alive/", notices)
        lease = etcd.grant_lease(LEASE_S)
        put(etcd, "/hci/alive/n", b"1", lease)
        notices.wait_for_content({"/hci/alive/n": b"1"})
        wait_until(subject, lambda: etcd.get("/hci/alive/n") is None)
        notices.wait_for_content({})
        watch.cancel()

    def test_watch_cancelled_delivers_nothing_more(self, subject: Subject) -> None:
        etcd, notices, other = subject.etcd, Notices(), Notices()
        watch = etcd.watch("/hci/w/", notices)
        remaining = etcd.watch("/hci/w/", other)
        notices.wait_for(lambda: len(notices.all) == 1)
        watch.cancel()
        watch.cancel()
        put(etcd, "/hci/w/a", b"1")
        other.wait_for_content({"/hci/w/a": b"1"})
        assert len(notices.all) == 1
        remaining.cancel()

    def test_notice_may_use_etcd_and_cancel_its_watch(self, subject: Subject) -> None:
        etcd, done = subject.etcd, threading.Event()
        watches: list[Watch] = []

        def on_notice(notice: Notice) -> None:
            if isinstance(notice, Changes):
                put(etcd, "/hci/seen", b"1")
                watches[0].cancel()
                done.set()

        watches.append(etcd.watch("/hci/w/", on_notice, put(etcd, "/hci/x", b"") + 1))
        put(etcd, "/hci/w/a", b"1")
        assert done.wait(HANG_S)
        assert etcd.get("/hci/seen") is not None

    def test_racing_transactions_on_one_key_lose_no_change(self, subject: Subject) -> None:
        etcd, threads, rounds = subject.etcd, 4, 25
        put(etcd, "/hci/count", b"0")

        def count_up() -> None:
            for _ in range(rounds):
                while True:
                    item = etcd.get("/hci/count")
                    assert item is not None
                    value = b"%d" % (int(item.value) + 1)
                    compare = ModRevisionEquals("/hci/count", item.mod_revision)
                    if etcd.transaction([compare], [Put("/hci/count", value)]).committed:
                        break

        counters = [threading.Thread(target=count_up) for _ in range(threads)]
        for thread in counters:
            thread.start()
        for thread in counters:
            thread.join(HANG_S)
        item = etcd.get("/hci/count")
        assert item is not None
        assert item.value == b"%d" % (threads * rounds)

    def test_closed_client_refuses_calls(self, subject: Subject) -> None:
        etcd, notices = subject.etcd, Notices()
        etcd.watch("/hci/w/", notices)
        etcd.close()
        with pytest.raises(ClientClosed):
            etcd.get("/hci/a")
        with pytest.raises(ClientClosed):
            etcd.transaction([], [Put("/hci/a", b"")])
        with pytest.raises(ClientClosed):
            etcd.refresh_lease(1)
        with pytest.raises(ClientClosed):
            etcd.watch("/hci/w/", notices)
        etcd.close()


def wait_until(subject: Subject, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        subject.wait(0.1)
