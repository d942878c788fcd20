"""How long a store that was set back waits, and when its node gives up."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from etcd import keys
from etcd.interface import Put
from etcd.memory import MemoryEtcd
from etcd.records import AliveRecord, NameRecord
from hci import set_back
from hci.set_back import ALONE_S, COPIED_S, SetBackJudge
from shard.ids import ImageId
from tests.unit.samples import image_record, node_record
from vmstore.catalog import Catalog

RUN, OTHER = "a" * 32, "b" * 32
IMAGE = ImageId("cd" * 16)
OWN = node_record(1, start_counter=3, run=RUN)
KNOWN = replace(OWN, start_counter=5, run=OTHER)


class Ending:
    """Remembers why it is time to end."""

    def __init__(self) -> None:
        self.failures: list[str] = []

    def fail(self, why: str) -> None:
        self.failures.append(why)


class Judged:
    """A judge over an etcd in memory, and a clock that stands still until it is moved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, serving: set[str]) -> None:
        self.memory = MemoryEtcd()
        self.ending: Any = Ending()
        self.now_s = 100.0
        self.judge = SetBackJudge(Catalog(self.memory), self.ending)
        monkeypatch.setattr(set_back, "time", SimpleNamespace(monotonic=lambda: self.now_s))
        monkeypatch.setattr(self.judge, "_serving", lambda _own: serving)

    def put(self, key: str, record: Any) -> None:
        self.memory.transaction([], [Put(key, record.encode())])

    def put_image(self) -> None:
        record = image_record(IMAGE, epoch=1, holder="f" * 32)
        self.put(record.key, record)
        self.put(keys.name("vms", "a"), NameRecord(image=IMAGE))


def test_store_that_another_run_may_have_waits_for_the_end_of_its_lease(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judged = Judged(monkeypatch, serving=set())
    judged.put(keys.alive("node1"), AliveRecord(start_counter=5, run=OTHER))
    assert "an older copy of the disk" in judged.judge.waits(KNOWN, OWN)
    judged.now_s += COPIED_S
    assert judged.judge.waits(KNOWN, OWN)
    assert judged.ending.failures == []
    judged.now_s += 1.0
    assert judged.judge.waits(KNOWN, OWN)
    assert "with a copy of this store" in judged.ending.failures[0]


def test_store_without_another_in_sync_waits_and_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    judged = Judged(monkeypatch, serving=set())
    judged.put_image()
    told = judged.judge.waits(KNOWN, OWN)
    assert f"no other node in sync of image {IMAGE} runs" in told
    judged.now_s += ALONE_S
    assert judged.judge.waits(KNOWN, OWN) == told
    assert judged.ending.failures == []
    judged.now_s += 1.0
    assert judged.judge.waits(KNOWN, OWN) == told
    assert judged.ending.failures == [told]


def test_store_with_another_in_sync_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    judged = Judged(monkeypatch, serving={"node2"})
    judged.put_image()
    assert judged.judge.waits(KNOWN, OWN) == ""
    assert judged.ending.failures == []
