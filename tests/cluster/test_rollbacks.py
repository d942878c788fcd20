"""`hci snapshot rollback` on a cluster of real processes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.test_snapshots import closed, copied, is_refused, take, url_at, write_at
from tests.devcluster import POOL, DevCluster
from tests.faults.nbd_session import NbdError, NbdSession
from tests.waiting import until

MIB = 1 << 20


@pytest.fixture(scope="module")
def two() -> Iterator[DevCluster]:
    """A cluster with two gateways, for all tests of this module: each has images of its own."""
    with DevCluster(gateways=2) as started:
        yield started


def back(cluster: DevCluster, name: str, *flags: str) -> str:
    return cluster.hci("snapshot", "rollback", f"{POOL}/{name}", *flags)


def used_bytes(cluster: DevCluster, image: str) -> int:
    return max(cluster.info(image)["used_bytes"].values())


def test_rolled_back_image_holds_what_it_held_at_the_size_that_it_had(
    two: DevCluster, tmp_path: Path
) -> None:
    two.create("web", "8M")
    first, second = os.urandom(8 * MIB), os.urandom(12 * MIB)
    file = tmp_path / "content"
    write_at(url_at(two, "gateway1", "web"), first, file)
    taken = take(two, "web@first")
    closed(two, "web")
    two.hci("image", "resize", f"{POOL}/web", "12M")
    write_at(url_at(two, "gateway2", "web"), second, file)
    for name in ("second", "third"):
        take(two, f"web@{name}")
    closed(two, "web")
    refused = is_refused(two, "snapshot", "rollback", f"{POOL}/web@first")
    assert "newer snapshots would go with what they hold (second, third); use --force" in refused
    assert copied(url_at(two, "gateway1", "web"), file) == second
    closed(two, "web")
    done = two.json("snapshot", "rollback", f"{POOL}/web@first", "--force")
    assert done == {
        "name": f"{POOL}/web@first",
        "created_at": taken["created_at"],
        "size_bytes": 8 * MIB,
        "former_size_bytes": 12 * MIB,
        "dropped": ["second", "third"],
    }
    closed(two, "web")
    assert two.info("web")["clean"] is True
    assert two.info("web")["size_bytes"] == 8 * MIB
    for gateway in two.gateways:
        assert copied(url_at(two, gateway, "web"), file) == first
        closed(two, "web")
        assert copied(url_at(two, gateway, "web@first"), file) == first
        with pytest.raises(NbdError):
            NbdSession(url_at(two, gateway, "web@second"), 1)
    assert [each["name"] for each in two.json("snapshot", "ls", f"{POOL}/web")] == [
        f"{POOL}/web@first"
    ]
    # And so on from there: a name that went is free.
    write_at(url_at(two, "gateway1", "web"), second[: 8 * MIB], file)
    take(two, "web@second")
    closed(two, "web")
    said = back(two, "web@second")
    assert "holds what it held at" in said
    assert "newer snapshots" not in said
    assert "size" not in said
    assert copied(url_at(two, "gateway2", "web"), file) == second[: 8 * MIB]
    assert two.check("web")["equal"]
    two.await_health("ok")


def test_space_of_what_was_written_since_comes_back(two: DevCluster, tmp_path: Path) -> None:
    two.create("space", "192M")
    file = tmp_path / "content"
    write_at(url_at(two, "gateway1", "space"), os.urandom(8 * MIB), file)
    take(two, "space@s")
    closed(two, "space")
    # More than a node's log holds, so that most of it is in files.
    write_at(url_at(two, "gateway1", "space"), os.urandom(192 * MIB), file)
    closed(two, "space")
    until("it is written", lambda: used_bytes(two, "space") > 100 * MIB)
    back(two, "space@s")
    until("its space is free again", lambda: used_bytes(two, "space") < 16 * MIB, 60)


def test_image_that_a_client_has_is_not_rolled_back_and_names_its_gateway(
    two: DevCluster,
) -> None:
    two.create("open", "8M")
    with NbdSession(url_at(two, "gateway2", "open"), 1) as session:
        session.call("write", 0, 64, 1)
        take(two, "open@s")
        session.call("write", 0, 64, 2)
        refused = is_refused(two, "snapshot", "rollback", f"{POOL}/open@s")
        assert "is in use on gateway gateway2; stop the guest or tool" in refused
        assert session.call("read", 0, 64) == [2] * 64
    # It is being closed just now, and is waited for.
    back(two, "open@s")
    with NbdSession(url_at(two, "gateway1", "open"), 1) as session:
        assert session.call("read", 0, 64) == [1] * 64


def test_reader_of_a_snapshot_that_goes_gets_errors_and_one_of_another_goes_on(
    two: DevCluster,
) -> None:
    two.create("read", "8M")
    with NbdSession(url_at(two, "gateway1", "read"), 1) as session:
        session.call("write", 0, 64, 1)
        take(two, "read@kept")
        session.call("write", 0, 64, 2)
        take(two, "read@going")
    with (
        NbdSession(url_at(two, "gateway2", "read@kept"), 1) as kept,
        NbdSession(url_at(two, "gateway2", "read@going"), 1) as going,
    ):
        assert (kept.call("read", 0, 64), going.call("read", 0, 64)) == ([1] * 64, [2] * 64)
        back(two, "read@kept", "--force")

        def is_over() -> bool:
            try:
                assert going.call("read", 0, 64) == [2] * 64
            except NbdError:
                return True
            return False

        until("its reader is sent away", is_over)
        assert kept.call("read", 0, 64) == [1] * 64


def test_node_that_was_away_holds_the_same_when_it_is_back(two: DevCluster, tmp_path: Path) -> None:
    two.create("away", "32M")
    file = tmp_path / "content"
    uri = url_at(two, "gateway1", "away")
    first, second = os.urandom(32 * MIB), os.urandom(32 * MIB)
    write_at(uri, first, file)
    take(two, "away@s")
    closed(two, "away")
    write_at(uri, second, file)
    closed(two, "away")
    two.kill("node3")
    try:
        write_at(uri, second[::-1], file)
        closed(two, "away")
        back(two, "away@s")
        assert copied(uri, file) == first
    finally:
        two.run("node3")
    two.await_health("ok")
    report = two.check("away")
    assert report["equal"], report
    assert [sorted(nodes) for nodes in report["compared"]] == [["node1", "node2", "node3"]]
    two.kill("node1")
    try:
        time.sleep(0.5)
        assert copied(uri, file) == first
    finally:
        two.run("node1")
    two.await_health("ok")


def test_rollbacks_that_cannot_be_made_are_refused_in_one_line(two: DevCluster) -> None:
    two.create("odd", "1M")
    rollback = ("snapshot", "rollback")
    assert "has no snapshot s; `hci snapshot ls" in is_refused(two, *rollback, f"{POOL}/odd@s")
    assert "names no snapshot: write POOL/IMAGE@NAME" in is_refused(two, *rollback, f"{POOL}/odd")
    assert "there is no image vms/no" in is_refused(two, *rollback, f"{POOL}/no@s")
