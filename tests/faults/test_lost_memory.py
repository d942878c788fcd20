"""Every node loses what it had not synced, while the guest lives on: its next flush says so, once.

What a node that could not sync leaves behind tells its next process, and that its gateways, that
its memory is another one; so does a reboot. The machine stays on here.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.devcluster import DevCluster
from tests.faults.load import ReconnectingDisk
from tests.faults.nbd_session import NbdError, NbdSession
from tests.faults.test_silent import silenced
from tests.waiting import until

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def lose_memory(cluster: DevCluster, *nodes: str, number: int) -> None:
    """Kills nodes; their next processes have another memory."""
    boot = BOOT_ID.read_text().strip().replace("-", "")
    members = cluster.members()
    for node in nodes:
        cluster.kill(node)
        (Path(members[node]["data_dir"]) / "forgotten").write_text(f"{boot} {number:032x}")


def all_nodes_lose_memory(cluster: DevCluster, number: int) -> None:
    """Has all nodes die and come back with another memory, at once for a gateway that lives on.

    Its image would else be healed, and flushed for that, where one of them is late.
    """
    with silenced(cluster, "gateway1"):
        lose_memory(cluster, *cluster.nodes, number=number)
        run(cluster, *cluster.nodes)


def run(cluster: DevCluster, *members: str) -> None:
    for member in members:
        cluster.run(member)


def test_flush_fails_once_where_all_nodes_lost_their_memory(cluster: DevCluster) -> None:
    cluster.create("disk", "16M")
    with NbdSession(cluster.url("disk"), 1) as session:
        session.call("write", 0, 64, 1)
        session.call("flush")
        all_nodes_lose_memory(cluster, 1)
        session.call("flush")
        session.call("write", 0, 64, 2)
        all_nodes_lose_memory(cluster, 2)
        with pytest.raises(NbdError, match="Input/output"):
            session.call("flush")
        session.call("flush")
        session.call("write", 64, 64, 3)
        session.call("flush")
    cluster.must_be_equal("disk")


def test_gateway_that_died_too_knows_of_the_loss(cluster: DevCluster, tmp_path: Path) -> None:
    cluster.create("disk", "16M")
    with (
        ReconnectingDisk(cluster.url("disk"), tmp_path) as disk,
        NbdSession(disk.uri, 1) as session,
    ):
        session.call("write", 0, 64, 1)
        session.call("flush")
        for number, forget in enumerate((False, True), 2):
            session.call("write", 0, 64, number)
            if forget:
                cluster.kill("gateway1")
                lose_memory(cluster, *cluster.nodes, number=number)
                run(cluster, *cluster.nodes, "gateway1")
                with pytest.raises(NbdError, match="Input/output"):
                    session.call("flush")
            else:
                for member in ("gateway1", *cluster.nodes):
                    cluster.kill(member)
                run(cluster, *cluster.nodes, "gateway1")
            session.call("flush")
        assert session.call("read", 0, 64) == [3] * 64
    # A guest that is started now was answered nothing.
    lose_memory(cluster, *cluster.nodes, number=9)
    run(cluster, *cluster.nodes)
    until("it opens", lambda: cluster.info("disk")["open_on"] is None)
    with NbdSession(cluster.url("disk"), 1) as session:
        session.call("flush")
    cluster.must_be_equal("disk")
