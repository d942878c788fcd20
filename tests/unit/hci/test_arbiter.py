"""The arbiter's daemon, apart from its process: what it believes before it registers."""

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from arbiter.exchange import Addressee, Verdict
from arbiter.record import Record
from arbiter.statement import Statement
from arbiter.voting import Voting
from etcd.memory import MemoryEtcd
from hci.arbiter import ArbiterDaemon
from shard.ids import image_id
from vmstore.catalog import Catalog

CLUSTER = "c" * 32
DELETED = image_id("1" * 32)


class Registering(ArbiterDaemon):
    """An arbiter's daemon over an etcd in memory, which does not listen."""

    def __init__(self, etcd: MemoryEtcd, folder: Path, name: str) -> None:
        self.config: Any = SimpleNamespace(cluster=SimpleNamespace(id=CLUSTER))
        self.own: Any = SimpleNamespace(name=name, listen="h:1", host="h", data_dir=folder)
        self.record = Record(folder, name=name, cluster=CLUSTER)
        self.voting = Voting(self.record)
        self.etcd: Any = etcd
        self.catalog = Catalog(etcd)
        self.failures: list[str] = []
        self.ending: Any = SimpleNamespace(wait=lambda _timeout_s: False, fail=self.failures.append)
        self.registered = False
        self.trouble = ""
        self._session = None
        self._session_lost = threading.Event()
        self._watching = False
        self._history_due_s = 0.0
        self._history_lost = False
        self._unconfirmed = set()

    def look_after(self) -> None:
        self._look_after()

    def vote_on_what_is_not_in_etcd(self) -> None:
        """Have votes of an image that etcd does not know, and no tombstone of it either."""
        stated = Statement(3, "a" * 32, 5, (frozenset("ab"),))
        reply = self.voting.confirm(Addressee(self.record.identity.id), DELETED, stated)
        assert reply.verdict is Verdict.GRANTED

    def end(self) -> None:
        if self._session is not None:
            self._session.close()
        self.record.close()


@pytest.fixture
def etcd() -> MemoryEtcd:
    return MemoryEtcd()


@pytest.fixture
def arbiter(etcd: MemoryEtcd, tmp_path: Path) -> Iterator[Registering]:
    started = Registering(etcd, tmp_path, "w")
    started.look_after()
    assert started.registered
    yield started
    started.end()


def started_again(etcd: MemoryEtcd, former: Registering) -> Registering:
    former.end()
    return Registering(etcd, former.own.data_dir, former.own.name)


def must_end_without_accusing(arbiter: Registering, why: str) -> None:
    arbiter.look_after()
    assert not arbiter.registered
    assert why in arbiter.failures[0]
    assert arbiter.catalog.lost() is None
    arbiter.end()


def test_arbiter_that_was_replaced_accuses_nobody_when_it_comes_back(
    etcd: MemoryEtcd, arbiter: Registering
) -> None:
    # It was away when it was replaced, and its votes were of images that were deleted since: it
    # had the whole cluster believe that etcd lost history, before it heard that it was retired.
    arbiter.vote_on_what_is_not_in_etcd()
    arbiter.catalog.retire_arbiter("w")
    back = started_again(etcd, arbiter)
    must_end_without_accusing(back, "was replaced")


def test_arbiter_that_was_set_back_accuses_nobody(
    etcd: MemoryEtcd, tmp_path: Path, arbiter: Registering
) -> None:
    older = (tmp_path / "arbiter").read_bytes()
    later = arbiter
    for _ in range(2):
        later = started_again(etcd, later)
        later.look_after()
        assert later.registered
    later.vote_on_what_is_not_in_etcd()
    later.end()
    (tmp_path / "arbiter").write_bytes(older)
    back = Registering(etcd, tmp_path, "w")
    must_end_without_accusing(back, "from its start 2")


def test_arbiter_accuses_no_other_cluster(tmp_path: Path, arbiter: Registering) -> None:
    # The configuration named the etcd of another cluster, which was then marked as lost.
    arbiter.vote_on_what_is_not_in_etcd()
    others = MemoryEtcd()
    Catalog(others).init_cluster("d" * 32)
    strayed = started_again(others, arbiter)
    must_end_without_accusing(strayed, "cluster")


def test_arbiter_of_an_etcd_that_lost_history_says_so(
    etcd: MemoryEtcd, arbiter: Registering
) -> None:
    arbiter.vote_on_what_is_not_in_etcd()
    back = started_again(etcd, arbiter)
    back.look_after()
    assert not back.registered
    assert back.failures == []
    lost = back.catalog.lost()
    assert lost is not None
    assert "on which was voted, is not in it" in lost.record.why
    back.end()
