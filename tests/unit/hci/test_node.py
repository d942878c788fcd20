"""The node's daemon, apart from its processes: what it answers and how it registers."""

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from etcd import keys
from etcd.errors import LeaseNotFound
from etcd.images import ImageRecord
from etcd.interface import Put
from etcd.memory import MemoryEtcd
from etcd.records import NodeRecord, TombstoneRecord
from hci import control_pb2 as pb
from hci.history import HistoryWatch
from hci.node import NodeControl, NodeDaemon
from hci.set_back import SetBackJudge
from shard.digest import UNREADABLE, digest
from shard.ids import ImageId
from tests.unit.samples import image_record
from vmstore.catalog import Catalog
from vmstore.errors import RecordChanged
from vmstore.ledger import Ledger
from vmstore.set_back import Marks

IMAGE = ImageId("cd" * 16)


def record() -> ImageRecord:
    return image_record(IMAGE, epoch=1, holder="f" * 32)


class Store:
    """A node's store with one damaged shard."""

    def read_shard(self, image: str, layers: list[int], shard: int) -> bytes | None:
        if shard == 1:
            raise RuntimeError("block 3 of shard 1 does not match its checksum")
        return b"content" if shard == 0 else None

    def failure(self) -> str | None:
        return None


def test_digest_of_a_damaged_shard_says_so_and_goes_on() -> None:
    # The check of an image with one damaged shard ended with "an internal error" of that node.
    node: Any = SimpleNamespace(
        engine=Store(),
        own=SimpleNamespace(name="node1"),
        catalog=SimpleNamespace(image=lambda _image: SimpleNamespace(record=record())),
    )
    request = pb.DigestRequest(image_id=IMAGE, first_shard=0, shards=3)
    found = list(NodeControl(node).Digest(request, None))  # type: ignore[arg-type]
    assert [(each.shard, each.blake3) for each in found] == [
        (0, digest([b"content"])),
        (1, UNREADABLE),
    ]


class Registering(NodeDaemon):
    """A node's daemon over an etcd in memory, without a store."""

    def __init__(self) -> None:
        self.config: Any = SimpleNamespace(cluster=SimpleNamespace(id="c" * 32))
        self.own: Any = SimpleNamespace(
            name="node1", listen="h:1", control="h:2", socket=None, host="h", zone="z"
        )
        self.memory = MemoryEtcd()
        self.etcd: Any = self.memory
        self.catalog = Catalog(self.memory)
        self._opening = threading.RLock()
        self._engine: Any = SimpleNamespace(
            inventory=lambda: {"images": [], "deleted": [], "distrusted": []},
            status=lambda: {"capacity_bytes": 1 << 40},
            store_id="d" * 32,
            start_counter=1,
            failure=lambda: None,
        )
        self.failures: list[str] = []
        self.ending: Any = SimpleNamespace(wait=lambda _timeout_s: False, fail=self.failures.append)
        self.registered = False
        self.trouble = ""
        self._session = None
        self._session_lost = threading.Event()
        self._unconfirmed: set[ImageId] = set()
        self._run = "a" * 32
        self._marks = Marks(Path("nowhere"))
        self._set_back_judge = SetBackJudge(self.catalog, self.ending)
        self.ledger = Ledger(Path(":memory:"))
        self.history = HistoryWatch(
            "node1", self.etcd, self.catalog, self.ledger, self._holdings, self._on_deleted
        )

    def look_after(self) -> None:
        self._look_after()

    def end(self) -> None:
        if self._session is not None:
            self._session.close()

    def lose_session(self) -> None:
        self.memory.advance(11)
        assert self._session is not None
        with pytest.raises(LeaseNotFound):
            self._session.renew()


@pytest.fixture
def node() -> Iterator[Registering]:
    started = Registering()
    yield started
    started.end()
    assert started.failures == []


def test_record_that_changes_meanwhile_is_announced_again(
    node: Registering, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Another program had changed the node's record: the node ended with a traceback.
    announce = node.catalog.announce_node
    changed = [RecordChanged("node node1")]

    def announce_after_a_change(record: NodeRecord, etcd_lease: int, run: str) -> None:
        if changed:
            raise changed.pop()
        announce(record, etcd_lease, run)

    monkeypatch.setattr(node.catalog, "announce_node", announce_after_a_change)
    node.look_after()
    assert not node.registered
    assert "try again" in node.trouble
    node.look_after()
    assert node.registered
    assert list(node.catalog.alive()) == ["node1"]


def test_node_that_registers_again_watches_once(
    node: Registering, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each new session added another watch on what was deleted, for as long as the node ran.
    watches: list[str] = []
    watch = node.memory.watch

    def counted(prefix: str, on_notice: Any, from_revision: int | None = None) -> object:
        watches.append(prefix)
        return watch(prefix, on_notice, from_revision)

    monkeypatch.setattr(node.memory, "watch", counted)
    for _ in range(3):
        node.look_after()
        assert node.registered
        assert list(node.catalog.alive()) == ["node1"]
        node.lose_session()
    assert len(watches) == 1


def test_node_accuses_no_other_cluster() -> None:
    # The configuration named the etcd of another cluster, which was then marked as lost.
    strayed = Registering()
    Catalog(strayed.memory).init_cluster("d" * 32)
    held = {"image": IMAGE, "epoch": 1, "holder": "f" * 32, "generation": 1, "digest": b"",
            "body": record().encode()}  # fmt: skip
    strayed._engine.inventory = lambda: {"images": [held], "deleted": [], "distrusted": []}
    strayed.look_after()
    assert not strayed.registered
    assert "d" * 32 in strayed.failures[0]
    assert strayed.catalog.lost() is None
    strayed.end()


def test_tombstone_that_no_notice_told_of_is_heeded(
    node: Registering, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The image was deleted as the node compared all that it knows with etcd. The notice was taken
    # for one of before that, and the data stayed until the node's next start.
    buried: list[ImageId] = []
    monkeypatch.setattr(node, "bury", buried.append)
    node.look_after()
    tombstone = TombstoneRecord(id=IMAGE, generation=1, awaits=("node1",))
    monkeypatch.setattr(node.history, "_follow", lambda _changes: None)
    foreign = Put(f"{keys.TOMBSTONES}of-nothing", b"")
    node.memory.transaction([], [Put(tombstone.key, tombstone.encode()), foreign])
    assert buried == []
    assert node.history.check()
    assert buried == [IMAGE]
