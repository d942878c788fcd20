"""fio verifies what it wrote while something befalls the cluster: no error, nothing lost."""

from __future__ import annotations

import time
from pathlib import Path
from random import Random

import pytest

from tests.faults.befalling import SURVIVED_BY_CONNECTIONS, Befalling, settle
from tests.faults.load import (
    DURATION_S,
    SIZE_MIB,
    VerifyingFio,
    drawn_fault,
    drawn_seed,
    fault_rounds,
)
from tests.faults.test_failing_disk import Disk
from tests.hosts.cluster import HostCluster

ROUNDS = fault_rounds(SURVIVED_BY_CONNECTIONS)


@pytest.mark.timeout(300 + 200 * ROUNDS)
def test_fio_verifies_what_it_wrote_whatever_befalls_the_cluster(
    hosts_and_disk: tuple[HostCluster, Disk], tmp_path: Path
) -> None:
    hosts, disk = hosts_and_disk
    for number in range(ROUNDS):
        seed = drawn_seed(number)
        chance = Random(seed)
        gateway = hosts.gateways[number % 2]
        image = f"verified-{number}"
        hosts.create(image, f"{SIZE_MIB}M")
        befalling = Befalling(hosts, disk, gateway, image, chance)
        name = drawn_fault(SURVIVED_BY_CONNECTIONS, chance, number)
        # While it writes: the first half.
        moment_s = chance.uniform(0.2, DURATION_S / 2)
        print(f"  {name} after {moment_s:.2f} s through {gateway}")
        with VerifyingFio(hosts.url_at(gateway, image), seed, tmp_path) as fio:
            time.sleep(moment_s)
            assert fio.is_running
            befalling.fault(name)()
            fio.finish()
        settle(hosts, image)
        hosts.must_be_equal(image)
        hosts.remove(image)
