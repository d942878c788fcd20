"""A guest with ext4 and a database: what it was told is committed is there, whatever dies.

Each round does something to the cluster at a random moment while the guest commits transactions,
then pulls the guest's plug in the midst of one, boots it again through another gateway, and has it
audit its database. Acknowledgements come over the guest's serial port, and are kept outside of it.
"""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from random import Random

import pytest

from tests.devcluster import POOL
from tests.e2e.guest.disk import GuestSystem, build_guest
from tests.e2e.guest.driver import Guest
from tests.e2e.guest.evidence import check_file_system
from tests.faults.befalling import EVERY, Befalling, put_into_files, settle
from tests.faults.load import drawn_fault, drawn_seed, fault_rounds
from tests.faults.test_failing_disk import Disk
from tests.hosts.cluster import HostCluster

MODES = ("wal", "delete")
ENOUGH = 400
AFTER = 30
"""Transactions that must still be committed once the fault has begun."""


ROUNDS = fault_rounds(EVERY)


@pytest.mark.timeout(600 + 250 * ROUNDS)
def test_guests_database_keeps_every_committed_transaction(
    hosts_and_disk: tuple[HostCluster, Disk], tmp_path: Path
) -> None:
    hosts, disk = hosts_and_disk
    system = build_guest(tmp_path / "build", database=True)
    hosts.hci("image", "import", str(system.disk), f"{POOL}/database")
    put_into_files(hosts, "gateway1")
    entries: dict[int, str] = {}
    for number in range(ROUNDS):
        chance = Random(drawn_seed(number))
        # The gateway whose guest it was, and the other one, in turn.
        gateway = hosts.gateways[number % 2]
        directory = tmp_path / f"round-{number}"
        directory.mkdir()
        _suffer(hosts, disk, system, gateway, directory, entries, number, chance)
        settle(hosts, "database")
    last = tmp_path / "last"
    last.mkdir()
    with Guest(system, hosts.url_at("gateway2", "database"), last) as guest:
        guest.entries.update(entries)
        print(f"{guest.audit()} transactions, {len(entries)} of them acknowledged")
        guest.power_off()
        assert guest.io_errors() == []
    hosts.await_health("ok")
    hosts.must_be_equal("database")
    raw = tmp_path / "exported.raw"
    hosts.hci("image", "export", f"{POOL}/database", str(raw))
    check_file_system(raw)


def _suffer(
    hosts: HostCluster,
    disk: Disk,
    system: GuestSystem,
    gateway: str,
    directory: Path,
    entries: dict[int, str],
    number: int,
    chance: Random,
) -> None:
    with Guest(system, hosts.url_at(gateway, "database"), directory) as guest:
        if entries:
            guest.entries.update(entries)
            guest.audit()
        befalling = Befalling(hosts, disk, gateway, "database", chance)
        name = drawn_fault(EVERY, chance, number)
        moment = chance.randrange(5, 60)
        mode = chance.choice(MODES)
        pulled_after = chance.randrange(AFTER, 2 * AFTER)
        failed: list[BaseException] = []

        def strike() -> None:
            try:
                befalling.fault(name)()
            except BaseException as error:  # noqa: BLE001 - it is the test's
                failed.append(error)

        thread = threading.Thread(target=strike, name="fault")
        first = 1_000_000 * number
        known = len(guest.entries)
        seen_after = 0
        for _ in guest.follow(f"record {first} {ENOUGH} {mode}", timeout_s=60):
            count = len(guest.entries) - known
            if count == moment and thread.ident is None:
                print(f"  {name} after {count} transactions, journal {mode}")
                thread.start()
            seen_after += thread.ident is not None
            if seen_after > pulled_after and not thread.is_alive():
                break
        assert guest.io_errors() == []
        assert len(guest.entries) - known > moment, "nothing was committed after the fault"
        guest.process.send_signal(signal.SIGKILL)
        guest.process.wait()
        thread.join()
        assert not failed, failed
        entries.update(guest.entries)
