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
    STRIKE_S,
    ReconnectingDisk,
    VerifyingFio,
    await_write,
    drawn_seed,
    rounds,
)
from tests.faults.nbd_session import NbdSession

OUTAGE_S = 0.5


def test_gateway_killed_under_fio_verify_gives_no_error(
    cluster: DevCluster, tmp_path: Path
) -> None:
    for number in range(rounds(1)):
        seed = drawn_seed(number)
        moment_s = random.Random(seed).uniform(0, STRIKE_S)
        print(f"round {number}: seed {seed}: {moment_s:.2f} s after the first write")
        image = f"round-{number}"
        directory = tmp_path / image
        directory.mkdir()
        cluster.create(image, f"{SIZE_MIB}M")
        with ReconnectingDisk(cluster.url(image), directory) as disk:
            with VerifyingFio(disk.uri, seed, directory) as fio:
                await_write(cluster, image, fio)
                time.sleep(moment_s)
                assert fio.is_running
                cluster.kill("gateway1")
                time.sleep(OUTAGE_S)
                cluster.run("gateway1")
                # The new process counts from 0: there was something left to write.
                await_write(cluster, image, fio)
                fio.finish()
        cluster.await_health("ok")
        assert cluster.info(image)["stale"] == []
        cluster.must_be_equal(image)
        cluster.remove(image)


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
