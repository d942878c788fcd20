"""A member dies as a snapshot is removed, or as it is merged: all others hold what they held."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.devcluster import POOL, DevCluster
from tests.faults.load import drawn_seed, rounds
from tests.faults.test_rollbacks import killed_in_the_midst, read, write
from tests.waiting import until

MIB = 1 << 20
MERGED_S = 120.0


@pytest.fixture(scope="module")
def two() -> Iterator[DevCluster]:
    """A cluster with two gateways, for all tests of this module: each has images of its own."""
    with DevCluster(gateways=2) as started:
        yield started


@pytest.mark.parametrize("victim", ["gateway1", "node2", "etcd"])
def test_member_killed_at_any_moment_of_a_removal_leaves_all_others_as_they_were(
    two: DevCluster, tmp_path: Path, victim: str
) -> None:
    for number in range(rounds(3)):
        chance = random.Random(drawn_seed(number))
        moment_s, going = chance.uniform(0.0, 0.6), chance.randrange(3)
        image, file = f"{victim}-{number}", tmp_path / "content"
        two.create(image, "16M")
        held: dict[str, bytes] = {}
        for name in ("first", "second", "third"):
            write(two, image, os.urandom(16 * MIB), file)
            two.hci("snapshot", "create", f"{POOL}/{image}@{name}")
            held[name] = file.read_bytes()
        write(two, image, os.urandom(16 * MIB), file)
        now = file.read_bytes()
        removed = list(held)[going]
        print(f"round {number}: {victim} is killed {moment_s * 1000:.0f} ms into {removed}'s end")
        done = killed_in_the_midst(
            two, ("snapshot", "rm", f"{POOL}/{image}@{removed}"), victim, moment_s
        )
        print(done.stdout, done.stderr)
        two.await_health("ok")
        del held[removed]
        for name, content in held.items():
            assert read(two, f"{image}@{name}", file) == content, f"{name} is another"
        assert read(two, image, file) == now
        until(f"{removed} is removed", lambda: is_gone(two, image, removed))  # noqa: B023
        until(
            f"{image} is merged",
            lambda: two.info(image)["merging"] == [],  # noqa: B023
            MERGED_S,
        )
        assert read(two, image, file) == now
        for name, content in held.items():
            assert read(two, f"{image}@{name}", file, "gateway1") == content
        assert two.check(image)["equal"]


def is_gone(cluster: DevCluster, image: str, name: str) -> bool:
    """Whether a snapshot is not there; one that is, is asked to be removed again."""
    names = [each["name"] for each in cluster.json("snapshot", "ls", f"{POOL}/{image}")]
    if f"{POOL}/{image}@{name}" not in names:
        return True
    cluster.try_hci("snapshot", "rm", f"{POOL}/{image}@{name}")
    return False
