"""Every process dies at once, etcd too, and all are started again: no flushed write is lost."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from pathlib import Path

from tests.devcluster import DevCluster
from tests.faults.flushed_writer import FlushedWriter
from tests.faults.load import (
    ReconnectingDisk,
    drawn_seed,
    gateways_lost_under_fio,
    rounds,
)
from tests.faults.nbd_session import NbdSession

IMAGE_MIB = 48
# Before this much was flushed a kill would prove little.
LEAST_FLUSHES = 3
FLUSHES_TIMEOUT_S = 60.0


def test_all_killed_under_writes_and_started_again_loses_no_answered_write(
    cluster: DevCluster,
) -> None:
    for number in range(rounds(1)):
        seed = drawn_seed(number)
        moment_s = random.Random(seed).uniform(0.2, 2.0)
        print(f"round {number}: seed {seed}: after {moment_s:.2f} s")
        image = f"round-{number}"
        cluster.create(image, f"{IMAGE_MIB}M")
        with NbdSession(cluster.url(image), seed) as session:
            writer = FlushedWriter(session.blocks, seed)
            running = threading.Thread(target=writer.run, args=(session, lambda: False))
            running.start()
            await_flushes(writer, running, LEAST_FLUSHES)
            time.sleep(moment_s)
            assert running.is_alive(), writer.error
            cluster.kill("all")
            # No member: it keeps the NBD sockets, and so they are gone as well.
            os.kill(holder_pid(cluster), signal.SIGKILL)
            running.join()
        cluster.run("all")
        verify_twice(cluster, image, writer, seed)
        cluster.remove(image)


def test_all_killed_under_fio_verify_gives_no_error(cluster: DevCluster, tmp_path: Path) -> None:
    def killed() -> None:
        cluster.kill("all")
        cluster.run("all")

    # Killed one after the other, a node may have been left behind before the gateway died.
    assert list(gateways_lost_under_fio(cluster, tmp_path, killed))


def test_all_killed_under_a_reconnecting_client_gives_it_no_error(
    cluster: DevCluster, tmp_path: Path
) -> None:
    seed = drawn_seed()
    cluster.create("guest", f"{IMAGE_MIB}M")
    with (
        ReconnectingDisk(cluster.url("guest"), tmp_path) as disk,
        NbdSession(disk.uri, seed) as session,
    ):
        writer = FlushedWriter(session.blocks, seed)
        enough = threading.Event()
        running = threading.Thread(target=writer.run, args=(session, enough.is_set))
        running.start()
        await_flushes(writer, running, LEAST_FLUSHES)
        cluster.kill("all")
        cluster.run("all")
        await_flushes(writer, running, writer.flushes + LEAST_FLUSHES)
        enough.set()
        running.join()
        assert writer.error is None
        assert writer.verify(session) == []
    verify_twice(cluster, "guest", writer, seed)


def holder_pid(cluster: DevCluster) -> int:
    """The process that holds the cluster's NBD sockets."""
    return int(json.loads((cluster.directory / "pid" / "holder.json").read_text())["pid"])


def await_flushes(writer: FlushedWriter, running: threading.Thread, count: int) -> None:
    """Waits until the writer has had `count` flushes answered."""
    deadline = time.monotonic() + FLUSHES_TIMEOUT_S
    while writer.flushes < count:
        assert running.is_alive(), writer.error
        assert time.monotonic() < deadline, f"{writer.flushes} of {count} flushes were answered"
        time.sleep(0.02)


def verify_twice(cluster: DevCluster, image: str, writer: FlushedWriter, seed: int) -> None:
    """Nothing is lost at the first open, replicas are equal then, and it stays so."""
    # Killed one after the other, a node may have been left behind before the gateway died.
    cluster.await_health("ok", "healing")
    with NbdSession(cluster.url(image), seed) as session:
        assert writer.verify(session) == []
    cluster.must_be_equal(image)
    with NbdSession(cluster.url(image), seed) as session:
        assert writer.verify(session) == []
