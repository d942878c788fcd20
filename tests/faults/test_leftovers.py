"""Deleted images stay deleted, and what is left over is found and collected safely."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tests.cluster.test_image_commands import importing
from tests.devcluster import POOL, DevCluster
from tests.faults.nbd_session import NbdSession
from tests.protocol.settings import metric
from tests.waiting import until


def folder(cluster: DevCluster, node: str, image_id: str) -> Path:
    return Path(cluster.members()[node]["data_dir"]) / "images" / image_id


def test_image_deleted_while_a_node_was_away_never_comes_back(cluster: DevCluster) -> None:
    cluster.create("gone", "16M")
    with NbdSession(cluster.url("gone"), 1) as session:
        session.call("write", 0, 256, 1)
        session.call("flush")
    until("it is closed", lambda: cluster.info("gone")["clean"])
    image_id = cluster.info("gone")["id"]
    cluster.kill("node3")
    cluster.remove("gone")
    until(
        "node3 is awaited",
        lambda: (
            [(each["kind"], each["nodes"]) for each in cluster.leftovers()]
            == [("deleted", ["node3"])]
        ),
    )
    refused = cluster.try_hci("cluster", "leftovers", image_id, "--collect", "--yes")
    assert "is no leftover that can be collected" in refused.stderr
    cluster.run("node3")
    until("nobody is awaited", lambda: not cluster.leftovers())
    for node in cluster.nodes:
        at = folder(cluster, node, image_id)
        until(f"the data is gone from {node}", lambda at=at: not at.exists())  # type: ignore[misc]
    # A node whose process starts anew still knows that it was deleted.
    cluster.kill("node3")
    cluster.run("node3")
    cluster.await_health("ok")
    assert cluster.json("image", "ls") == []
    assert cluster.leftovers() == []


def test_unknown_data_is_shown_and_deleted_by_name_only(cluster: DevCluster) -> None:
    image_id = "ab" * 16
    at = folder(cluster, "node2", image_id)
    cluster.kill("node2")
    shard = at / "1" / "00" / "0"
    shard.parent.mkdir(parents=True)
    shard.write_bytes(b"x" * 8192)
    cluster.run("node2")
    cluster.await_health("ok")
    (found,) = cluster.leftovers()
    assert (found["kind"], found["image"], found["nodes"]) == ("unknown", image_id, ["node2"])
    assert found["physical_bytes"] >= 8192
    assert metric(cluster, "node2", "hci_node_unknown_images") == 1
    sizes = {node["name"]: node["unknown_bytes"] for node in cluster.json("node", "ls")}
    assert sizes["node2"] >= 8192 and sizes["node1"] == 0
    assert "that etcd does not know" in cluster.hci("status")
    cluster.hci("cluster", "leftovers", "--collect", "--yes")
    assert at.exists(), "nothing unknown is deleted unless it is named"
    unconfirmed = cluster.try_hci("cluster", "leftovers", image_id, "--collect")
    assert "--yes" in unconfirmed.stderr and at.exists()
    cluster.hci("cluster", "leftovers", image_id, "--collect", "--yes")
    until("it is gone", lambda: not at.exists() and not cluster.leftovers())


def test_interrupted_import_is_found_and_collected(cluster: DevCluster, tmp_path: Path) -> None:
    source = tmp_path / "source.raw"
    source.write_bytes(os.urandom(96 << 20))
    running, qemu_img = importing(cluster, source, f"{POOL}/half")
    running.kill()
    running.wait()
    os.kill(qemu_img, signal.SIGCONT)
    until("it is left over", lambda: [e["collectable"] for e in cluster.leftovers()] == [True])
    (found,) = cluster.leftovers()
    assert (found["kind"], found["name"]) == ("import", f"{POOL}/half")
    cluster.hci("cluster", "leftovers", "--collect", "--yes")
    assert cluster.json("image", "ls") == []
    until("nothing is left", lambda: not cluster.leftovers())
    cluster.hci("image", "import", str(source), f"{POOL}/half", timeout_s=120)
    assert cluster.leftovers() == [], "what was imported whole is no leftover"
