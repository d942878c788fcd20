"""A node on another node's disk, an emptied one, an older copy, or a copy that runs beside it."""

from __future__ import annotations

import json
import shutil
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.devcluster import DevCluster
from tests.faults.nbd_session import NbdSession
from tests.waiting import until


def data_dir(cluster: DevCluster, node: str) -> Path:
    return Path(cluster.members()[node]["data_dir"])


@contextmanager
def disk_of(cluster: DevCluster, node: str, disk: Path | None) -> Iterator[None]:
    """Gives a node, which does not run, another disk; None is an empty one."""
    own = data_dir(cluster, node)
    aside = own.with_name(own.name + "-aside")
    own.rename(aside)
    if disk is not None:
        shutil.copytree(disk, own)
    try:
        yield
    finally:
        shutil.rmtree(own, ignore_errors=True)
        aside.rename(own)


def refusal(cluster: DevCluster, node: str) -> str:
    refused = cluster.try_hci("dev", "run", node)
    assert refused.returncode == 1
    return refused.stderr


def put_back(cluster: DevCluster, node: str, disk: Path) -> None:
    """Put an older copy in place of the disk of a node that does not run."""
    own = data_dir(cluster, node)
    shutil.rmtree(own)
    shutil.copytree(disk, own)


def test_node_on_a_disk_that_is_not_its_own_is_refused(cluster: DevCluster) -> None:
    cluster.create("goes-on", "16M")
    with NbdSession(cluster.url("goes-on"), 1) as session:
        session.call("write", 0, 64, 1)
        session.call("flush")
        cluster.kill("node3")
        with disk_of(cluster, "node3", None):
            assert "is registered with the store" in refusal(cluster, "node3")
        with disk_of(cluster, "node3", data_dir(cluster, "node2")):
            assert "node2" in refusal(cluster, "node3")
        session.call("write", 0, 32, 2)
        session.call("flush")
        cluster.run("node3")
        cluster.await_health("ok")
        assert session.call("read", 0, 64) == [2] * 32 + [1] * 32
    cluster.must_be_equal("goes-on")


def set_back(cluster: DevCluster) -> list[str]:
    """The images whose content on node3 counts for nothing, as it keeps them itself."""
    marks = json.loads((data_dir(cluster, "node3") / "set-back").read_text())
    return list(marks["images"])


@pytest.mark.parametrize("starts", [1, 3], ids=["same-counter", "counter-behind"])
def test_node_on_an_older_copy_of_its_disk_is_healed_by_itself(
    cluster: DevCluster, tmp_path: Path, starts: int
) -> None:
    """Nothing that it holds counts, whatever it says of itself; guests go on meanwhile."""
    image, old = f"older-{starts}", tmp_path / "old"
    cluster.create(image, "16M")
    cluster.create(f"gone-{starts}", "16M")
    gone = cluster.info(f"gone-{starts}")["id"]
    with NbdSession(cluster.url(f"gone-{starts}"), 1) as session:
        session.call("write", 0, 8, 5)
        session.call("flush")
    with NbdSession(cluster.url(image), 1) as session:
        session.call("write", 0, 64, 1)
        session.call("flush")
        cluster.kill("node3")
        shutil.copytree(data_dir(cluster, "node3"), old)
        for start in range(starts):
            cluster.run("node3")
            cluster.await_health("ok")
            session.call("write", 0, 32, 2)
            session.call("flush")
            if start == starts - 1:
                # Its own copy of the cluster's records is as old: it proves nothing about etcd.
                cluster.remove(f"gone-{starts}")
                until("all nodes deleted it", lambda: not cluster.leftovers())
            cluster.kill("node3")
        put_back(cluster, "node3", old)
        session.call("write", 32, 16, 3)
        cluster.run("node3")
        cluster.await_health("ok")
        assert session.call("read", 0, 64) == [2] * 32 + [3] * 16 + [1] * 16
        log = (cluster.directory / "log" / "node3.log").read_text()
        assert "store_set_back" in log
        # Images that were deleted since stay of no account; nothing of them was held against etcd.
        until("the heal is noted", lambda: cluster.info(image)["id"] not in set_back(cluster))
        # They are shown, as they take space, and go when they are named.
        (found,) = cluster.leftovers()
        assert (found["kind"], found["image"], found["nodes"]) == ("unknown", gone, ["node3"])
        cluster.hci("cluster", "leftovers", gone, "--collect", "--yes")
        until("it is gone", lambda: not cluster.leftovers())
    cluster.must_be_equal(image)


def test_node_on_an_older_copy_waits_for_another_one_in_sync(
    cluster: DevCluster, tmp_path: Path
) -> None:
    """Were all disks of a replica set put back together, nobody would be left to say so."""
    cluster.create("alone", "16M")
    old = tmp_path / "old"
    with NbdSession(cluster.url("alone"), 1) as session:
        session.call("write", 0, 64, 1)
        session.call("flush")
    cluster.kill("node3")
    shutil.copytree(data_dir(cluster, "node3"), old)
    for _ in range(2):
        cluster.run("node3")
        cluster.await_health("ok")
        cluster.kill("node3")
    put_back(cluster, "node3", old)
    for other in ("node1", "node2"):
        cluster.kill(other)
    cluster.await_nodes("down", "node1", "node2", "node3")
    # It answers `hci` while it asks etcd, so it may count as started before it ends.
    cluster.try_hci("dev", "run", "node3")
    log, deadline = cluster.directory / "log" / "node3.log", time.monotonic() + 60
    while "from which it could be healed; start those first" not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()[-2000:]
        time.sleep(0.2)
    assert "the cluster saw start" in log.read_text()
    cluster.await_nodes("down", "node3")
    for node in ("node1", "node2", "node3"):
        cluster.run(node)
    cluster.await_health("ok")
    cluster.must_be_equal("alone")


def test_copy_of_a_disk_is_refused_while_its_original_runs(
    cluster: DevCluster, tmp_path: Path
) -> None:
    cluster.kill("node3")
    copy = tmp_path / "copy"
    shutil.copytree(data_dir(cluster, "node3"), copy)
    cluster.run("node3")
    text = cluster.config.read_text()
    own = tomllib.loads(text)["node"]["node3"]
    other = cluster.directory / "copied.toml"
    for key, value in (("data_dir", str(copy)), ("listen", ""), ("control", ""), ("socket", "")):
        before = str(own[key])
        host, _, port = before.rpartition(":")
        # One beside is in use by nobody who stays: the process ends before it serves anyone.
        after = value or (f"{host}:{_free_port()}" if port.isdigit() else f"{before}2")
        text = text.replace(f'"{before}"', f'"{after}"')
    text = "\n".join(line for line in text.splitlines() if not line.startswith("metrics"))
    other.write_text(text)
    refused = cluster.try_hci("--config", str(other), "node", "serve", "--name", "node3",
                              timeout_s=60)  # fmt: skip
    assert refused.returncode == 1
    assert "with a copy of this store" in refused.stderr
    assert "never copy a data_dir" in refused.stderr
    cluster.await_health("ok")


def _free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
