"""A member dies or falls silent as a snapshot is taken: guests go on, and nothing is half done."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.devcluster import POOL, DevCluster
from tests.faults.load import ReconnectingDisk, drawn_seed, rounds
from tests.faults.nbd_session import NbdSession
from tests.prepared import Prepared
from tests.tools.load import SteadyLoad
from tests.waiting import stop

ASKED_S = 0.5
"""A command whose imports are behind it has asked its gateway by then."""

HELD_S = 3.0
"""How long clients wait at most where etcd is silent: 1 s for it, and the rest is room."""

TAKEN_S = 60.0


@pytest.fixture(scope="module")
def two() -> Iterator[DevCluster]:
    """A cluster with two gateways, for all tests of this module: images keep their snapshots."""
    with DevCluster(gateways=2) as started:
        yield started


class Taking:
    """`hci snapshot create` in the background."""

    def __init__(self, cluster: DevCluster, name: str) -> None:
        self._program = Prepared(cluster.around(), cluster.environment())
        self._program.run(("--version",), TAKEN_S)
        self._done: subprocess.CompletedProcess[str] | None = None
        arguments = ("snapshot", "create", f"{POOL}/{name}")
        self._thread = threading.Thread(target=self._run, args=(arguments,))
        self._thread.start()

    def _run(self, arguments: tuple[str, ...]) -> None:
        self._done = self._program.run(arguments, TAKEN_S)

    def ended(self) -> subprocess.CompletedProcess[str]:
        """How it ended."""
        self._thread.join(TAKEN_S)
        self._program.close()
        assert self._done is not None, "it does not end"
        return self._done


@contextmanager
def guest_at(cluster: DevCluster, image: str, folder: Path) -> Iterator[SteadyLoad]:
    """A guest that never stops asking, and sees no error."""
    cluster.create(image, "64M")
    uri = cluster.url_at("gateway1", image)
    with (
        ReconnectingDisk(uri, folder) as disk,
        NbdSession(disk.uri, 1) as session,
        SteadyLoad(session, 1) as load,
    ):
        load.settle(0.3, TAKEN_S)
        yield load
        load.settle(0.3, TAKEN_S)
        load.stop()
        assert load.errors == []


def must_be_whole(cluster: DevCluster, image: str, *, taken: bool | None) -> None:
    """All is well: the snapshot is there, or is not (None: either), and a next one can be taken."""
    cluster.run("all")
    cluster.await_health("ok")
    # What was not taken is out of the record when the next one is.
    cluster.hci("snapshot", "create", f"{POOL}/{image}@next")
    names = [each["name"] for each in cluster.json("snapshot", "ls", f"{POOL}/{image}")]
    first, following = f"{POOL}/{image}@s", f"{POOL}/{image}@next"
    assert names in ([following], [first, following])
    assert taken is None or (first in names) == taken
    for snapshot in names:
        copies = [
            subprocess.run(
                ["nbdcopy", cluster.url_at(gateway, snapshot.removeprefix(f"{POOL}/")), "-"],
                capture_output=True,
                check=True,
            ).stdout
            for gateway in cluster.gateways
        ]
        assert copies[0] == copies[1], f"{snapshot} differs"
    report = cluster.check(image)
    assert report["equal"], report


@contextmanager
def freezing(cluster: DevCluster, image: str) -> Iterator[tuple[Taking, int]]:
    """A snapshot whose freeze waits for a node that stands still; the node's process."""
    pid = int(cluster.members()["node3"]["pid"])
    stop(pid)
    try:
        taking = Taking(cluster, f"{image}@s")
        time.sleep(ASKED_S)
        yield taking, pid
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def test_node_that_dies_as_an_image_freezes_is_left_behind_and_the_snapshot_is_taken(
    two: DevCluster, tmp_path: Path
) -> None:
    with guest_at(two, "node", tmp_path):
        with freezing(two, "node") as (taking, _):
            two.kill("node3")
            done = taking.ended()
        assert done.returncode == 0, done.stderr
        must_be_whole(two, "node", taken=True)


def test_gateway_that_dies_as_an_image_freezes_leaves_no_snapshot(
    two: DevCluster, tmp_path: Path
) -> None:
    with guest_at(two, "gateway", tmp_path):
        with freezing(two, "gateway") as (taking, _):
            two.kill("gateway1")
            done = taking.ended()
        assert done.returncode == 1
        assert "gateway1 does not answer" in done.stderr
        must_be_whole(two, "gateway", taken=False)


def test_etcd_that_is_silent_as_an_image_is_frozen_does_not_hold_its_guest_up(
    two: DevCluster, tmp_path: Path
) -> None:
    etcd = next(m for m in two.members().values() if m["kind"] == "etcd")
    with guest_at(two, "etcd", tmp_path) as load:
        with freezing(two, "etcd") as (taking, node):
            stop(int(etcd["pid"]))
            try:
                load.begin()
                os.kill(node, signal.SIGCONT)
                done = taking.ended()
                load.settle(0.3, TAKEN_S)
                waited_s = load.worst_s
                answered = load.answered
            finally:
                os.kill(int(etcd["pid"]), signal.SIGCONT)
        print(f"the longest wait: {waited_s:.2f} s; {done.stderr}")
        assert done.returncode == 1, done.stdout
        assert "etcd did not answer within 1 s" in done.stderr
        assert answered > 0
        assert waited_s < HELD_S
        must_be_whole(two, "etcd", taken=False)


@pytest.mark.parametrize("victim", ["gateway1", "node2", "etcd"])
def test_member_killed_at_any_moment_of_a_snapshot_leaves_all_or_nothing(
    two: DevCluster, tmp_path: Path, victim: str
) -> None:
    for number in range(rounds(3)):
        moment_s = random.Random(drawn_seed(number)).uniform(0.0, 0.12)
        image, folder = f"{victim}-{number}", tmp_path / str(number)
        folder.mkdir()
        print(f"round {number}: {victim} is killed after {moment_s * 1000:.0f} ms")
        with guest_at(two, image, folder):
            taking = Taking(two, f"{image}@s")
            time.sleep(moment_s)
            two.kill(victim)
            two.run(victim)
            done = taking.ended()
            print(done.stdout, done.stderr)
            must_be_whole(two, image, taken=True if done.returncode == 0 else None)
