"""fio verifies what it wrote while something befalls the cluster: no error, nothing lost."""

from __future__ import annotations

import time
from pathlib import Path
from random import Random

import pytest

from tests.faults.befalling import Befalling, settle
from tests.faults.load import DURATION_S, SIZE_MIB, VerifyingFio, drawn_seed, rounds
from tests.hosts.cluster import HostCluster


@pytest.mark.timeout(300 + 100 * rounds(1))
def test_fio_verifies_what_it_wrote_whatever_befalls_the_cluster(
    hosts: HostCluster, tmp_path: Path
) -> None:
    for number in range(rounds(1)):
        seed = drawn_seed(number)
        chance = Random(seed)
        gateway = hosts.gateways[number % 2]
        image = f"verified-{number}"
        hosts.create(image, f"{SIZE_MIB}M")
        faults = Befalling(hosts, gateway, image, chance).survived_by_connections()
        fault = chance.choice(faults)
        # While it writes: the first half.
        moment_s = chance.uniform(0.2, DURATION_S / 2)
        print(f"  {fault.__name__} after {moment_s:.2f} s through {gateway}")
        with VerifyingFio(hosts.url_at(gateway, image), seed, tmp_path) as fio:
            time.sleep(moment_s)
            assert fio.is_running
            fault()
            fio.finish()
        settle(hosts, image)
        hosts.await_health("ok")
        hosts.must_be_equal(image)
        hosts.remove(image)
