"""The gateway's process dies under load and is started again: clients wait and go on."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

from tests.devcluster import DevCluster
from tests.faults.flushed_writer import FlushedWriter
from tests.faults.load import (
    SIZE_MIB,
    ReconnectingDisk,
    VerifyingFio,
    await_write,
    drawn_seed,
    gateways_lost_under_fio,
    rounds,
)
from tests.faults.nbd_session import NbdSession

OUTAGE_S = 0.5


def test_gateway_killed_under_fio_verify_gives_no_error(
    cluster: DevCluster, tmp_path: Path
) -> None:
    def killed_for_a_while() -> None:
        cluster.kill("gateway1")
        time.sleep(OUTAGE_S)
        cluster.run("gateway1")

    for image in gateways_lost_under_fio(cluster, tmp_path, killed_for_a_while):
        assert cluster.info(image)["stale"] == []


def test_gateway_killed_during_writes_loses_no_answered_write(
    cluster: DevCluster, tmp_path: Path
) -> None:
    seed = drawn_seed()
    cluster.create("stamped", "32M")
    with (
        ReconnectingDisk(cluster.url("stamped"), tmp_path) as disk,
        NbdSession(disk.uri, seed) as session,
    ):
        writer = FlushedWriter(session.blocks, seed)
        enough = threading.Event()
        running = threading.Thread(target=writer.run, args=(session, enough.is_set))
        running.start()
        for _ in range(rounds(2)):
            time.sleep(1)
            cluster.kill("gateway1")
            cluster.run("gateway1")
        time.sleep(1)
        enough.set()
        running.join()
        assert writer.error is None
        assert writer.verify(session) == []
    assert cluster.info("stamped")["stale"] == []
    cluster.must_be_equal("stamped")


def test_gateway_and_node_killed_together_gives_no_error(
    cluster: DevCluster, tmp_path: Path
) -> None:
    seed = drawn_seed()
    victim = random.Random(seed).choice(cluster.nodes)
    print(f"seed {seed}: {victim}")
    cluster.create("both", f"{SIZE_MIB}M")
    with ReconnectingDisk(cluster.url("both"), tmp_path) as disk:
        with VerifyingFio(disk.uri, seed, tmp_path) as fio:
            await_write(cluster, "both", fio)
            assert fio.is_running
            cluster.kill("gateway1")
            cluster.kill(victim)
            cluster.run("gateway1")
            fio.finish()
    assert [entry["node"] for entry in cluster.info("both")["stale"]] == [victim]
    cluster.must_be_equal("both")
