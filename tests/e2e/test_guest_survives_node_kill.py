"""A real guest goes on while a storage node dies, and its disk holds all that it synced."""

from __future__ import annotations

import threading
from pathlib import Path

from tests.devcluster import POOL, DevCluster
from tests.e2e.guest.disk import build_guest
from tests.e2e.guest.driver import Guest
from tests.e2e.guest.evidence import check_file_system, check_files

FILES = 15
REMOVED = 3
RECORDS = 60


def test_guest_writing_when_a_node_is_killed_keeps_every_synced_file(
    cluster: DevCluster, tmp_path: Path
) -> None:
    system = build_guest(tmp_path / "build")
    cluster.hci("image", "import", str(system.disk), f"{POOL}/guest")
    killer = threading.Thread(target=cluster.kill, args=("node3",))
    with Guest(system, cluster.url("guest"), tmp_path) as guest:
        for _ in guest.follow(f"write 0 {FILES} 512"):
            if len(guest.files) == FILES // 3:
                killer.start()
        killer.join()
        guest.run(f"commit 0 {RECORDS}")
        guest.run(f"remove 0 {REMOVED}")
        for number in range(REMOVED):
            del guest.files[number]
        assert guest.verify() == FILES - REMOVED
        stale = cluster.info("guest")["stale"]
        guest.power_off()
        assert guest.io_errors() == []

    assert {entry["node"] for entry in stale} == {"node3"}
    raw = tmp_path / "exported.raw"
    cluster.hci("image", "export", f"{POOL}/guest", str(raw))
    check_file_system(raw)
    assert check_files(raw, guest.files, guest.records) == FILES - REMOVED + RECORDS


def test_guest_rebooted_after_all_members_were_killed_finds_every_synced_file(
    cluster: DevCluster, tmp_path: Path
) -> None:
    system = build_guest(tmp_path / "build")
    cluster.hci("image", "import", str(system.disk), f"{POOL}/again")
    first_run, second_run = tmp_path / "first", tmp_path / "second"
    first_run.mkdir()
    second_run.mkdir()
    with Guest(system, cluster.url("again"), first_run) as guest:
        guest.run("write 0 6 512")
        guest.run("commit 0 20")
        cluster.kill("all")
    cluster.run("all")
    cluster.await_health("ok", "degraded")
    with Guest(system, cluster.url("again"), second_run) as rebooted:
        rebooted.files.update(guest.files)
        rebooted.run("write 6 2 512")
        rebooted.verify()
        rebooted.power_off()
    raw = tmp_path / "exported.raw"
    cluster.hci("image", "export", f"{POOL}/again", str(raw))
    check_file_system(raw)
    assert check_files(raw, rebooted.files, guest.records) == 28
