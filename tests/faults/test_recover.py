"""etcd put back to an older copy, or lost whole: noticed, and rebuilt from the nodes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.devcluster import POOL, DevCluster
from tests.faults.load import ReconnectingDisk
from tests.faults.nbd_session import NbdError, NbdSession
from tests.protocol.settings import metric
from tests.waiting import HANG_S, until

"""A hang detector: what is waited for takes a few seconds at most."""

pytestmark = pytest.mark.timeout(900)


def etcd_data(cluster: DevCluster) -> Path:
    return Path(cluster.members()["etcd"]["data_dir"])


def back_up(cluster: DevCluster) -> Path:
    """Keeps a copy of etcd as it is now."""
    kept = cluster.directory / "etcd-kept"
    cluster.kill("etcd")
    shutil.copytree(etcd_data(cluster), kept)
    cluster.run("etcd")
    cluster.await_health("ok")
    return kept


def put_back(cluster: DevCluster, kept: Path | None) -> None:
    """Replaces etcd by a copy, or an empty one, while everything else runs."""
    data = etcd_data(cluster)
    cluster.kill("etcd")
    shutil.rmtree(data)
    if kept is not None:
        shutil.copytree(kept, data)
    cluster.run("etcd")


def is_noticed(cluster: DevCluster) -> bool:
    return "etcd lost history" in problems(cluster)


def problems(cluster: DevCluster) -> str:
    return "\n".join(
        f"{each['what']} {each['advice']}" for each in cluster.json("status")["problems"]
    )


def recover(cluster: DevCluster, *options: str) -> dict[str, Any]:
    plan: dict[str, Any] = cluster.json("cluster", "recover", "--yes", *options)
    until("all is well again", lambda: not is_noticed(cluster))
    return plan


def image_of(plan: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [image for image in plan["images"] if image["name"] == f"{POOL}/{name}"]
    return found  # type: ignore[no-any-return]


def log_of(cluster: DevCluster, member: str) -> str:
    return Path(cluster.members()[member]["log"]).read_text()


def write(cluster: DevCluster, image: str, version: int, blocks: int = 64) -> None:
    with NbdSession(cluster.url(image), 1) as session:
        session.call("write", 0, blocks, version)
        session.call("flush")
    until(f"{image} is closed", lambda: cluster.info(image)["clean"])


def read(cluster: DevCluster, image: str, blocks: int = 64) -> list[int]:
    with NbdSession(cluster.url(image), 1) as session:
        return session.call("read", 0, blocks)


@pytest.mark.parametrize("lost_whole", [False, True], ids=["restored", "lost"])
def test_snapshots_are_rebuilt_with_what_they_hold(lost_whole: bool) -> None:
    with DevCluster() as cluster:
        cluster.create("a", "16M")
        write(cluster, "a", 1)
        cluster.hci("snapshot", "create", f"{POOL}/a@first")
        write(cluster, "a", 2)
        kept = None if lost_whole else back_up(cluster)
        cluster.hci("snapshot", "create", f"{POOL}/a@second")
        write(cluster, "a", 3)
        before = cluster.json("snapshot", "ls")
        put_back(cluster, kept)
        until("it is noticed", lambda: is_noticed(cluster))
        assert "etcd lost history" in cluster.try_hci("snapshot", "create", f"{POOL}/a@x").stderr
        recover(cluster)
        cluster.await_health("ok")
        assert cluster.json("snapshot", "ls") == before
        cluster.hci("snapshot", "create", f"{POOL}/a@third")
        for name, version in (("a@first", 1), ("a@second", 2), ("a@third", 3), ("a", 3)):
            with NbdSession(cluster.url_at("gateway1", name), 1) as session:
                assert session.call("read", 0, 64) == [version] * 64, name
        cluster.must_be_equal("a")


@pytest.mark.parametrize("lost_whole", [False, True], ids=["restored", "lost"])
def test_records_are_rebuilt_with_names_pools_and_deletes(lost_whole: bool) -> None:
    with DevCluster() as cluster:
        for image in ("kept", "gone"):
            cluster.create(image, "16M")
            write(cluster, image, 1)
        kept = None if lost_whole else back_up(cluster)
        cluster.create("later", "32M")
        cluster.create("unopened", "8M")
        cluster.hci("image", "resize", f"{POOL}/kept", "24M")
        cluster.hci("pool", "create", "second", "--shard-size", "1M")
        write(cluster, "kept", 2)
        write(cluster, "later", 3)
        cluster.remove("gone")
        before = {image["name"]: image for image in cluster.json("image", "ls")}
        put_back(cluster, kept)
        until("it is noticed", lambda: is_noticed(cluster))
        assert "hci cluster recover" in problems(cluster)
        assert cluster.health() == "unavailable"
        # Who looked first has said it; the others may have been refused since.
        until(
            "a node says so",
            lambda: any("history_lost" in log_of(cluster, node) for node in cluster.nodes),
        )
        until(
            "its metric does",
            lambda: any(metric(cluster, node, "hci_node_history_lost") for node in cluster.nodes),
        )
        with pytest.raises(NbdError):
            NbdSession(cluster.url_at("gateway1", "kept"), 1)
        for command in (("image", "create", f"{POOL}/new", "8M"), ("pool", "create", "third")):
            assert "etcd lost history" in cluster.try_hci(*command).stderr
        shown = cluster.hci("cluster", "recover", "--dry-run")
        assert "vms/later" in shown
        assert is_noticed(cluster), "a dry run changes nothing"
        unconfirmed = cluster.try_hci("cluster", "recover")
        assert "--yes" in unconfirmed.stderr
        plan = recover(cluster)
        assert image_of(plan, "kept")["known"]["epoch"] == before["vms/kept"]["epoch"]
        assert image_of(plan, "kept")["written"]["epoch"] == before["vms/kept"]["epoch"] + 2
        cluster.await_health("ok")
        after = {image["name"]: image for image in cluster.json("image", "ls")}
        assert after.keys() == before.keys()
        for name, image in before.items():
            assert after[name]["id"] == image["id"]
            assert after[name]["size_bytes"] == image["size_bytes"]
            assert after[name]["generation"] == image["generation"] + 2
        pools = {pool["name"]: pool for pool in cluster.json("pool", "ls")}
        assert pools["second"]["shard_bytes"] == 1 << 20
        assert read(cluster, "kept") == [2] * 64
        assert read(cluster, "later") == [3] * 64
        assert read(cluster, "unopened") == [0] * 64
        write(cluster, "kept", 4)
        cluster.must_be_equal("kept")
        again = cluster.json("cluster", "recover", "--yes")
        assert not again["needed"], "a second run finds nothing to do"
        # The same name again is another image, which no leftover of the first one shines through.
        cluster.create("gone", "16M")
        assert read(cluster, "gone") == [0] * 64


def test_stale_node_stays_stale_and_is_healed_after_that() -> None:
    with DevCluster() as cluster:
        cluster.create("left", "16M")
        write(cluster, "left", 1)
        kept = back_up(cluster)
        with NbdSession(cluster.url("left"), 1) as session:
            cluster.kill("node3")
            session.call("write", 0, 64, 2)
            session.call("flush")
        put_back(cluster, kept)
        until("it is noticed", lambda: is_noticed(cluster))
        plan = recover(cluster)
        assert "node3" in plan["not_heard"]
        assert sorted(image_of(plan, "left")["in_sync"][0]) == ["node1", "node2"]
        assert [entry["node"] for entry in cluster.info("left")["stale"]] == ["node3"]
        cluster.run("node3")
        until("node3 is healed", lambda: not cluster.info("left")["stale"])
        assert read(cluster, "left") == [2] * 64
        cluster.must_be_equal("left")


def test_too_few_nodes_are_refused_and_named() -> None:
    with DevCluster() as cluster:
        cluster.create("few", "16M")
        write(cluster, "few", 1)
        put_back(cluster, None)
        until("it is noticed", lambda: is_noticed(cluster))
        cluster.kill("node2")
        cluster.kill("node3")
        refused = cluster.try_hci("cluster", "recover", "--yes")
        assert refused.returncode == 1
        assert "vms/few" in refused.stderr
        assert "node2, node3 missing, two are needed" in refused.stderr
        shown = cluster.hci("cluster", "recover", "--dry-run", "--force")
        assert "vms/few: --force loses what node2, node3 may know" in shown
        cluster.run("node3")
        plan = recover(cluster)
        assert image_of(plan, "few")["missing"] == []
        cluster.run("node2")
        cluster.await_health("ok")
        assert read(cluster, "few") == [1] * 64


def test_nodes_that_know_better_than_a_forced_recovery_are_followed() -> None:
    """Recovered from the one node that had been left behind, and not believed by the others."""
    with DevCluster() as cluster:
        cluster.create("forced", "16M")
        write(cluster, "forced", 1)
        with NbdSession(cluster.url("forced"), 1) as session:
            cluster.kill("node1")
            session.call("write", 0, 64, 2)
            session.call("flush")
            assert [entry["node"] for entry in cluster.info("forced")["stale"]] == ["node1"]
        cluster.kill("all")
        shutil.rmtree(etcd_data(cluster))
        cluster.run("etcd")
        cluster.run("node1")
        cluster.run("gateway1")
        until("it is noticed", lambda: is_noticed(cluster))
        plan = recover(cluster, "--force")
        assert image_of(plan, "forced")["losses"]
        cluster.run("node2")
        cluster.run("node3")
        with pytest.raises(NbdError):
            NbdSession(cluster.url("forced"), 1)
        until("it is said", lambda: "was not heard when etcd was recovered" in problems(cluster))
        plan = recover(cluster)
        assert sorted(image_of(plan, "forced")["in_sync"][0]) == ["node2", "node3"]
        until("node1 is healed", lambda: not cluster.info("forced")["stale"])
        assert read(cluster, "forced") == [2] * 64
        cluster.must_be_equal("forced")


def test_recovery_that_was_killed_goes_on() -> None:
    with DevCluster() as cluster:
        for number in range(40):
            cluster.create(f"image-{number:02}", "8M")
        write(cluster, "image-07", 7)
        before = cluster.json("image", "ls")
        put_back(cluster, None)
        until("it is noticed", lambda: is_noticed(cluster))
        for signal_number, pause_s in ((signal.SIGKILL, 0.8), (signal.SIGINT, 1.1)):
            running = subprocess.Popen(
                cluster.command("cluster", "recover", "--yes"),
                env=cluster.environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            time.sleep(pause_s)
            running.send_signal(signal_number)
            running.wait()
        plan = json.loads(cluster.hci("cluster", "recover", "--yes", "--json"))
        print({image["action"] for image in plan["images"]})
        cluster.await_health("ok")
        after = cluster.json("image", "ls")
        assert [image["name"] for image in after] == [image["name"] for image in before]
        assert {i["generation"] - b["generation"] for i, b in zip(after, before, strict=True)} == {
            2
        }, "raised once, however often it was begun"
        assert read(cluster, "image-07") == [7] * 64


@pytest.mark.parametrize("lost_whole", [False, True], ids=["restored", "lost"])
def test_running_guest_goes_on_before_and_after(lost_whole: bool, tmp_path: Path) -> None:
    with DevCluster() as cluster:
        cluster.create("guest", "16M")
        kept = None if lost_whole else back_up(cluster)
        with ReconnectingDisk(cluster.url("guest"), tmp_path) as disk:
            with NbdSession(disk.uri, 1) as session:
                session.call("write", 0, 64, 1)
                put_back(cluster, kept)
                until("it is noticed", lambda: is_noticed(cluster))
                version = session.go_on(13, 64)
                recover(cluster)
                session.call("write", 0, 32, version + 1)
                session.call("flush")
                wanted = [version + 1] * 32 + [version] * 32
                assert session.call("read", 0, 64) == wanted
                cluster.await_health("ok")
                cluster.kill("node2")
                session.call("write", 64, 32, 1)
                assert session.call("read", 0, 64) == wanted
                assert [e["node"] for e in cluster.info("guest")["stale"]] == ["node2"]
                cluster.run("node2")
        assert "image_recovered" in log_of(cluster, "gateway1")
        until("it is healed", lambda: not cluster.info("guest")["stale"])
        cluster.must_be_equal("guest")


def test_node_lost_while_etcd_is_behind_stalls_writes_until_it_is_recovered(
    tmp_path: Path,
) -> None:
    with DevCluster() as cluster:
        cluster.create("stall", "16M")
        with ReconnectingDisk(cluster.url("stall"), tmp_path) as disk:
            with NbdSession(disk.uri, 1) as session:
                session.call("write", 0, 64, 1)
                session.call("flush")
                put_back(cluster, None)
                until("it is noticed", lambda: is_noticed(cluster))
                cluster.kill("node3")
                waiting = session.submit("write", 0, 16, 2)
                time.sleep(3)
                assert not waiting.done(), "answered without a record that says who missed it"
                recover(cluster)
                assert waiting.result(timeout=HANG_S) == []
                assert session.call("read", 0, 32) == [2] * 16 + [1] * 16


def test_thin_arbiter_stands_in_for_the_node_that_is_away() -> None:
    with DevCluster(nodes=2, arbiter=True) as cluster:
        cluster.create("pair", "16M")
        write(cluster, "pair", 1)
        kept = back_up(cluster)
        with NbdSession(cluster.url("pair"), 1) as session:
            cluster.kill("node1")
            session.call("write", 0, 64, 2)
            session.call("flush")
        cluster.kill("all")
        data = etcd_data(cluster)
        shutil.rmtree(data)
        shutil.copytree(kept, data)
        for member in ("etcd", "arbiter", "node1", "gateway1"):
            cluster.run(member)
        until("it is noticed", lambda: is_noticed(cluster))
        # node1 alone believes that it is in sync; the arbiter knows that it is not.
        plan = recover(cluster)
        assert image_of(plan, "pair")["in_sync"] == [["node2"]]
        cluster.run("node2")
        cluster.await_nodes("up", "node2")
        until("node1 is healed", lambda: not cluster.info("pair")["stale"])
        assert read(cluster, "pair") == [2] * 64
