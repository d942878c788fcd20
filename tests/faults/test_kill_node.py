"""A storage node dies at a random moment under load: no I/O error, nothing lost."""

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
    VerifyingFio,
    await_write,
    drawn_seed,
    rounds,
    seeds,
)
from tests.faults.nbd_session import NbdSession


def test_node_killed_under_fio_verify_gives_no_error(cluster: DevCluster, tmp_path: Path) -> None:
    for number, seed in enumerate(seeds(rounds(3))):
        # In turn: the one on the gateway's host, from which it reads, is among them.
        victim = cluster.nodes[seed % len(cluster.nodes)]
        moment_s = random.Random(seed).uniform(0, STRIKE_S)
        print(f"round {number}: seed {seed}: {victim} {moment_s:.2f} s after the first write")
        image = f"round-{number}"
        cluster.create(image, f"{SIZE_MIB}M")
        with VerifyingFio(cluster.url(image), seed, tmp_path) as fio:
            await_write(cluster, image, fio)
            time.sleep(moment_s)
            assert fio.is_running
            cluster.kill(victim)
            fio.finish()
            stale = {entry["node"] for entry in cluster.info(image)["stale"]}
        assert stale == {victim}
        cluster.run(victim)
        cluster.await_nodes("up", victim)
        cluster.must_be_equal(image)
        cluster.remove(image)


def test_node_killed_during_writes_loses_no_answered_write(cluster: DevCluster) -> None:
    seed = drawn_seed()
    victim = random.Random(seed).choice(cluster.nodes)
    print(f"seed {seed}: {victim}")
    cluster.create("stamped", "32M")
    with NbdSession(cluster.url("stamped"), seed) as session:
        writer = FlushedWriter(session.blocks, seed)
        enough = threading.Event()
        running = threading.Thread(target=writer.run, args=(session, enough.is_set))
        running.start()
        time.sleep(1)
        cluster.kill(victim)
        time.sleep(1)
        enough.set()
        running.join()
        assert writer.error is None
        assert writer.verify(session) == []
        assert [entry["node"] for entry in cluster.info("stamped")["stale"]] == [victim]
    # What is read after the image was closed and opened again comes from the nodes in sync.
    cluster.run(victim)
    cluster.await_nodes("up", victim)
    with NbdSession(cluster.url("stamped"), seed) as session:
        assert writer.verify(session) == []
    cluster.must_be_equal("stamped")


def test_node_killed_while_idle_and_started_again_is_not_stale(cluster: DevCluster) -> None:
    cluster.create("idle", "16M")
    with NbdSession(cluster.url("idle"), 1) as session:
        session.call("write", 0, 16, 1)
        session.call("flush")
    cluster.kill("node1")
    cluster.run("node1")
    cluster.await_health("ok")
    assert cluster.info("idle")["stale"] == []
    assert cluster.check("idle") == {**cluster.check("idle"), "equal": True, "different": []}
    with NbdSession(cluster.url("idle"), 1) as session:
        assert session.call("read", 0, 16) == [1] * 16
