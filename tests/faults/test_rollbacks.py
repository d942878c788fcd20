"""A member dies as an image is rolled back: it holds what it held, or what its snapshot does."""

from __future__ import annotations

import os
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.devcluster import POOL, DevCluster
from tests.faults.load import drawn_seed, rounds
from tests.prepared import Prepared
from tests.waiting import until

MIB = 1 << 20
DONE_S = 60.0


@pytest.fixture(scope="module")
def two() -> Iterator[DevCluster]:
    """A cluster with two gateways, for all tests of this module: each has images of its own."""
    with DevCluster(gateways=2) as started:
        yield started


def write(cluster: DevCluster, image: str, content: bytes, file: Path) -> None:
    """Write an image from its beginning; it is closed then."""
    file.write_bytes(content)
    uri = cluster.url_at("gateway1", image)
    subprocess.run(["nbdcopy", "--flush", str(file), uri], check=True, timeout=60)
    until(f"{image} is closed", lambda: cluster.info(image)["open_on"] is None)


def read(cluster: DevCluster, image: str, file: Path, gateway: str = "gateway2") -> bytes:
    """What it holds; the lease of a gateway that was killed is waited for."""
    command = ["nbdcopy", cluster.url_at(gateway, image), str(file)]
    until(f"{image} is read", lambda: subprocess.run(command, timeout=60).returncode == 0)
    return file.read_bytes()


@pytest.mark.parametrize("victim", ["gateway1", "node2", "etcd"])
def test_member_killed_at_any_moment_of_a_rollback_leaves_one_or_the_other(
    two: DevCluster, tmp_path: Path, victim: str
) -> None:
    for number in range(rounds(4)):
        moment_s = random.Random(drawn_seed(number)).uniform(0.0, 0.15)
        image, file = f"{victim}-{number}", tmp_path / "content"
        kept, since = os.urandom(8 * MIB), os.urandom(8 * MIB)
        two.create(image, "8M")
        write(two, image, kept, file)
        two.hci("snapshot", "create", f"{POOL}/{image}@s")
        until(f"{image} is closed", lambda: two.info(image)["open_on"] is None)  # noqa: B023
        write(two, image, since, file)
        print(f"round {number}: {victim} is killed after {moment_s * 1000:.0f} ms")
        arguments = ("snapshot", "rollback", f"{POOL}/{image}@s")
        done = killed_in_the_midst(two, arguments, victim, moment_s)
        print(done.stdout, done.stderr)
        two.await_health("ok")
        # Whoever opens it next decides nothing: the record says what it holds.
        found = read(two, image, file)
        assert found in (kept, since), f"round {number}: {image} holds neither"
        if done.returncode == 0:
            assert found == kept, "it was said to be done"
        elif "nothing was rolled back" in done.stderr:
            assert found == since, "it was said to have failed"
        assert two.check(image)["equal"]
        until(f"{image} is closed", lambda: two.info(image)["open_on"] is None)  # noqa: B023
        two.hci("snapshot", "rollback", f"{POOL}/{image}@s")
        assert read(two, image, file) == kept
        assert read(two, f"{image}@s", file, "gateway1") == kept


def killed_in_the_midst(
    cluster: DevCluster, arguments: tuple[str, ...], victim: str, moment_s: float
) -> subprocess.CompletedProcess[str]:
    """How a command ends as a member is killed so long after it was begun; it runs again then."""
    program = Prepared(cluster.around(), cluster.environment())
    ended: list[subprocess.CompletedProcess[str]] = []
    try:
        program.run(("--version",), DONE_S)
        running = threading.Thread(target=lambda: ended.append(program.run(arguments, DONE_S)))
        running.start()
        time.sleep(moment_s)
        cluster.kill(victim)
        cluster.run(victim)
        running.join(DONE_S)
    finally:
        program.close()
    assert ended, "it does not end"
    return ended[0]
