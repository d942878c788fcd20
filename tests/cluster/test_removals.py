"""`hci snapshot rm` on a cluster of real processes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.test_snapshots import closed, copied, is_refused, take, url_at, write_at
from tests.devcluster import POOL, DevCluster
from tests.faults.load import drawn_seed
from tests.faults.nbd_session import NbdError, NbdSession
from tests.faults.writing import await_progress, writing
from tests.waiting import until

MIB = 1 << 20


@pytest.fixture(scope="module")
def two() -> Iterator[DevCluster]:
    """A cluster with two gateways, for all tests of this module: each has images of its own."""
    with DevCluster(gateways=2) as started:
        yield started


def rm(cluster: DevCluster, name: str, *flags: str) -> str:
    return cluster.hci("snapshot", "rm", f"{POOL}/{name}", *flags)


def names(cluster: DevCluster, image: str) -> list[str]:
    return [each["name"] for each in cluster.json("snapshot", "ls", f"{POOL}/{image}")]


def merged(cluster: DevCluster, image: str) -> None:
    until(f"{image} is merged", lambda: cluster.info(image)["merging"] == [], 120)


def test_snapshots_removed_under_writes_leave_the_others_and_the_image_as_they_were(
    two: DevCluster, tmp_path: Path
) -> None:
    two.create("busy", "64M")
    seed = drawn_seed()
    with NbdSession(url_at(two, "gateway1", "busy"), seed) as session:
        with writing(session, seed) as writer:
            for number in (0, 1):
                await_progress(writer)
                take(two, f"busy@{number}")
            assert "by and by" in rm(two, "busy@0")
            for number in (2, 3, 4):
                await_progress(writer)
                take(two, f"busy@{number}")
            for number in (2, 4):
                rm(two, f"busy@{number}")
            held = {
                number: copied(url_at(two, "gateway2", f"busy@{number}"), tmp_path / "file")
                for number in (1, 3)
            }
            await_progress(writer)
        merged(two, "busy")
        assert writer.verify(session) == []
    for gateway in two.gateways:
        for number in (1, 3):
            again = copied(url_at(two, gateway, f"busy@{number}"), tmp_path / "file")
            assert again == held[number]
    assert names(two, "busy") == [f"{POOL}/busy@1", f"{POOL}/busy@3"]
    report = two.check("busy")
    assert report["equal"], report
    assert len(two.json("snapshot", "info", f"{POOL}/busy@3")["layers"]) == 2
    two.await_health("ok")


def test_space_of_removed_snapshots_comes_back_also_of_an_image_that_is_closed(
    two: DevCluster, tmp_path: Path
) -> None:
    two.create("space", "64M")
    uri, file = url_at(two, "gateway1", "space"), tmp_path / "content"
    content = b""
    for number in range(4):
        content = os.urandom(64 * MIB)
        write_at(uri, content, file)
        take(two, f"space@{number}")
        closed(two, "space")

    def used() -> int:
        return int(max(two.info("space")["used_bytes"].values()))

    until("it is written", lambda: used() > 150 * MIB)
    for number in range(4):
        said = rm(two, f"space@{number}", *(["--wait"] if number == 3 else []))
    assert "and freed what it alone kept" in said
    merged(two, "space")
    assert names(two, "space") == []
    until("its space is free", lambda: used() < 90 * MIB, 90)
    assert copied(uri, file) == content
    closed(two, "space")
    two.hci("image", "rm", f"{POOL}/space")


def test_node_that_was_away_merges_when_it_is_back(two: DevCluster, tmp_path: Path) -> None:
    two.create("away", "16M")
    uri, file = url_at(two, "gateway1", "away"), tmp_path / "content"
    contents = [os.urandom(16 * MIB) for _ in range(3)]
    for number, content in enumerate(contents):
        write_at(uri, content, file)
        take(two, f"away@{number}")
        closed(two, "away")
    two.kill("node3")
    try:
        rm(two, "away@1")
        listed = two.hci("snapshot", "ls", f"{POOL}/away")
        assert "vms/away: a removed snapshot is being merged" in listed
        assert two.info("away")["merging"] == [2]
        time.sleep(4)
        assert two.info("away")["merging"] == [2]
    finally:
        two.run("node3")
    two.await_health("ok")
    merged(two, "away")
    for number in (0, 2):
        assert copied(url_at(two, "gateway2", f"away@{number}"), file) == contents[number]
    assert copied(uri, file) == contents[2]
    report = two.check("away")
    assert report["equal"], report


def test_reader_of_a_removed_snapshot_gets_errors_and_one_of_another_goes_on(
    two: DevCluster,
) -> None:
    two.create("read", "8M")
    with NbdSession(url_at(two, "gateway1", "read"), 1) as session:
        session.call("write", 0, 64, 1)
        take(two, "read@going")
        session.call("write", 64, 64, 2)
        take(two, "read@kept")
    with (
        NbdSession(url_at(two, "gateway2", "read@kept"), 1) as kept,
        NbdSession(url_at(two, "gateway2", "read@going"), 1) as going,
    ):
        assert going.call("read", 0, 64) == [1] * 64
        rm(two, "read@going")

        def is_over() -> bool:
            try:
                assert going.call("read", 0, 64) == [1] * 64
            except NbdError:
                return True
            return False

        until("its reader is sent away", is_over)
        assert kept.call("read", 0, 128) == [1] * 64 + [2] * 64
        merged(two, "read")
        assert kept.call("read", 0, 128) == [1] * 64 + [2] * 64


def test_removals_that_cannot_be_made_are_refused_in_one_line(two: DevCluster) -> None:
    two.create("odd", "1M")
    take(two, "odd@s")
    assert "has no snapshot t; `hci snapshot ls" in is_refused(
        two, "snapshot", "rm", f"{POOL}/odd@t"
    )
    assert "names no snapshot" in is_refused(two, "snapshot", "rm", f"{POOL}/odd")
    assert "remove it with `hci snapshot rm`" in is_refused(two, "image", "rm", f"{POOL}/odd")
    done = two.json("snapshot", "rm", f"{POOL}/odd@s", "--wait")
    assert done == {"name": f"{POOL}/odd@s", "layer": 1, "merged": True}
    take(two, "odd@s")
