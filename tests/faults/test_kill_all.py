"""Every process dies at once, etcd too, and all are started again: no flushed write is lost."""

from __future__ import annotations

import random
import threading
import time

from tests.devcluster import DevCluster
from tests.faults.flushed_writer import FlushedWriter
from tests.faults.load import rounds
from tests.faults.nbd_session import NbdSession

IMAGE_MIB = 48
# Before this much was flushed a kill would prove little.
LEAST_FLUSHES = 3


def test_all_killed_under_writes_and_started_again_loses_no_answered_write(
    cluster: DevCluster,
) -> None:
    for number in range(rounds(2)):
        seed = random.randrange(1 << 32)
        moment_s = random.Random(seed).uniform(0.2, 2.0)
        print(f"round {number}: seed {seed}: after {moment_s:.2f} s")
        image = f"round-{number}"
        cluster.create(image, f"{IMAGE_MIB}M")
        writer = _write_until_all_are_killed(cluster, image, seed, moment_s)
        cluster.run("all")
        # Killed one after the other, a node may have been left behind before the gateway died.
        cluster.await_health("ok", "degraded")
        with NbdSession(cluster.url(image), seed) as session:
            assert writer.verify(session) == []
        verdict = cluster.check(image)
        assert verdict["equal"], verdict
        with NbdSession(cluster.url(image), seed) as session:
            assert writer.verify(session) == []
        cluster.remove(image)


def _write_until_all_are_killed(
    cluster: DevCluster, image: str, seed: int, moment_s: float
) -> FlushedWriter:
    with NbdSession(cluster.url(image), seed) as session:
        writer = FlushedWriter(session.blocks, seed)
        running = threading.Thread(target=writer.run, args=(session, lambda: False))
        running.start()
        while writer.flushes < LEAST_FLUSHES and running.is_alive():
            time.sleep(0.02)
        time.sleep(moment_s)
        assert running.is_alive(), writer.error
        cluster.kill("all")
        running.join()
    assert writer.error is not None, "the session outlived the gateway"
    return writer
