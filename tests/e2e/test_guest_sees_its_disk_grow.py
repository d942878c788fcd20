"""A disk grows under a guest that writes to it: the guest sees it, and writes to the new part.

QEMU takes a larger size from its NBD server only where it has connected anew since; then
`block_resize` to exactly that size. No request of the guest may fail on the way.
"""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest

from tests.devcluster import POOL, DevCluster
from tests.e2e.guest.disk import build_guest
from tests.e2e.guest.driver import Guest
from tests.e2e.guest.evidence import check_file_system, check_files
from tests.e2e.guest.machine import MachineError

FILES = 12
MIB = 1 << 20


def test_guest_that_writes_sees_its_disk_grow_and_writes_to_the_new_part(
    cluster: DevCluster, tmp_path: Path
) -> None:
    system = build_guest(tmp_path / "build")
    name = f"{POOL}/growing"
    cluster.hci("image", "import", str(system.disk), name)
    before = int(cluster.info("growing")["size_bytes"])
    size = before + 64 * MIB
    with Guest(system, cluster.url("growing"), tmp_path) as guest:
        assert guest.run("size") == [f"SIZE {before}"]
        cluster.hci("image", "resize", name, str(size))
        with pytest.raises(MachineError, match="Cannot grow NBD nodes"):
            guest.ask("block_resize", node_name="disk", size=size)
        for _ in guest.follow(f"write 0 {FILES} 512"):
            if len(guest.files) == FILES // 3:
                cluster.hci("image", "resize", name, str(size), "--reconnect")
        # QEMU connects anew with the next request, of whoever it is.
        guest.run("commit 0 1")
        guest.ask("block_resize", node_name="disk", size=size)
        assert guest.disk_bytes() == size
        assert guest.run("size") == [f"SIZE {size}"]
        written = guest.run("end 256")[0].removeprefix("END ")
        assert guest.verify() == FILES
        guest.power_off()
        assert guest.io_errors() == []
    raw = tmp_path / "exported.raw"
    cluster.hci("image", "export", name, str(raw))
    assert raw.stat().st_size == size
    with raw.open("rb") as exported:
        exported.seek(size - 256 * 1024)
        assert hashlib.sha256(exported.read()).hexdigest() == written
    subprocess.run(["truncate", "-s", str(before), str(raw)], check=True)
    check_file_system(raw)
    assert check_files(raw, guest.files, guest.records) == FILES + 1


def test_image_that_a_guest_has_open_does_not_shrink(cluster: DevCluster, tmp_path: Path) -> None:
    system = build_guest(tmp_path / "build")
    name = f"{POOL}/kept"
    cluster.hci("image", "import", str(system.disk), name)
    before = cluster.info("kept")["size_bytes"]
    with Guest(system, cluster.url("kept"), tmp_path) as guest:
        refused = cluster.try_hci("image", "resize", name, "1M", "--force", "--reconnect")
        assert refused.returncode == 1
        assert "gateway1" in refused.stderr
        guest.run("write 0 1 64")
        assert guest.verify() == 1
        guest.power_off()
        assert guest.io_errors() == []
    assert cluster.info("kept")["size_bytes"] == before
