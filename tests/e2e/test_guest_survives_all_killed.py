"""A guest whose whole cluster died under it is rebooted, and its disk holds all that it synced.

That it goes on while one node dies is what the demo shows, and `test_demo.py` with it.
"""

from __future__ import annotations

from pathlib import Path

from tests.devcluster import POOL, DevCluster
from tests.e2e.guest.disk import build_guest
from tests.e2e.guest.driver import Guest
from tests.e2e.guest.evidence import check_file_system, check_files

FILES = 6
MORE = 2
REMOVED = 3
RECORDS = 20


def test_guest_rebooted_after_all_members_were_killed_finds_every_synced_file(
    cluster: DevCluster, tmp_path: Path
) -> None:
    system = build_guest(tmp_path / "build")
    cluster.hci("image", "import", str(system.disk), f"{POOL}/again")
    first_run, second_run = tmp_path / "first", tmp_path / "second"
    first_run.mkdir()
    second_run.mkdir()
    with Guest(system, cluster.url("again"), first_run) as guest:
        guest.run(f"write 0 {FILES} 512")
        guest.run(f"commit 0 {RECORDS}")
        cluster.kill("all")
    cluster.run("all")
    cluster.await_health("ok", "degraded")
    with Guest(system, cluster.url("again"), second_run) as rebooted:
        rebooted.files.update(guest.files)
        rebooted.run(f"write {FILES} {MORE} 512")
        rebooted.run(f"remove 0 {REMOVED}")
        for number in range(REMOVED):
            del rebooted.files[number]
        rebooted.verify()
        rebooted.power_off()
    raw = tmp_path / "exported.raw"
    cluster.hci("image", "export", f"{POOL}/again", str(raw))
    check_file_system(raw)
    assert check_files(raw, rebooted.files, guest.records) == FILES + MORE - REMOVED + RECORDS
