"""A guest installs Debian's packages on its disk with dpkg, runs what it installed, removes it.

Under TCG with `cache=none`, so each sync of dpkg's reaches the nodes, and what is read was not kept
by QEMU's host. What the disk holds afterwards is judged from outside by the packages themselves,
and what the guest gives back, with `fstrim` and by itself (`mount -o discard`), by the physical
bytes of `hci image info`.
"""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.devcluster import POOL, DevCluster
from tests.e2e.guest.disk import build_guest
from tests.e2e.guest.driver import Guest
from tests.e2e.guest.evidence import check_file_system, check_files
from tests.e2e.guest.kernel import installation

MIB = 1 << 20
# Hang detectors: dpkg takes half a minute under TCG on a machine that does nothing else.
INSTALL_S = 500
PATIENCE_S = 60
# Perl with its libraries is well above this, whichever release of Debian it comes from.
PACKAGES_BYTES = 40 * MIB
# dpkg syncs what it unpacks before it renames it: packages at once, some files each for itself.
FLUSHES = 50
FILES, FILE_KIB = 4, 8192


def contents(packages: Sequence[Path]) -> str:
    """How many files packages consist of, and a digest of them, as the guest's `contents`."""
    sums: dict[bytes, str] = {}
    for package in packages:
        unpacked = subprocess.run(
            ["dpkg-deb", "--fsys-tarfile", package], capture_output=True, check=True, timeout=60
        )
        with tarfile.open(fileobj=io.BytesIO(unpacked.stdout)) as archive:
            for member in archive:
                if member.isfile() or member.islnk():
                    file = archive.extractfile(member)
                    assert file is not None
                    path = member.name.removeprefix(".").encode()
                    sums[path] = hashlib.sha256(file.read()).hexdigest()
    listed = b"".join(b"%s %s\n" % (path, sums[path].encode()) for path in sorted(sums))
    return f"CONTENTS {len(sums)} {hashlib.sha256(listed).hexdigest()}"


def used(cluster: DevCluster) -> dict[str, int]:
    """Physical bytes of the guest's image on each node."""
    found = {node: int(used) for node, used in cluster.info("worked")["used_bytes"].items()}
    assert set(found) == set(cluster.nodes)
    return found


def await_used(cluster: DevCluster, right: Callable[[str, int], bool]) -> dict[str, int]:
    """Waits until the use of each node is right; a checkpoint may have to end first."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        found = used(cluster)
        if all(right(node, bytes_) for node, bytes_ in found.items()):
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.2)


@pytest.mark.timeout(1200)
def test_guest_installs_packages_runs_them_and_gives_their_space_back(
    cluster: DevCluster, tmp_path: Path
) -> None:
    install = installation()
    system = build_guest(tmp_path / "build", install=install)
    name = f"{POOL}/worked"
    cluster.hci("image", "import", str(system.disk), name)
    uri = cluster.url("worked")
    expected = contents(install.packages)
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    empty = used(cluster)
    with Guest(system, uri, first) as guest:
        said = guest.run("install", timeout_s=INSTALL_S)
        assert said == [f"INSTALLED {len(install.packages)}"]
        assert guest.run("contents") == [expected]
        assert guest.transferred()["flush_operations"] > FLUSHES
        guest.power_off()
        assert guest.io_errors() == []
    full = used(cluster)
    assert all(full[node] >= empty[node] + PACKAGES_BYTES for node in full), (empty, full)
    with Guest(system, uri, second) as guest:
        # Now nothing of it can come from the memory of the guest that wrote it.
        assert guest.run("contents") == [expected]
        assert guest.run("purge", timeout_s=INSTALL_S) == ["PURGED"]
        purged = await_used(cluster, lambda node, now: now <= full[node] - PACKAGES_BYTES)

        guest.run("discard")
        guest.run(f"write 0 {FILES} {FILE_KIB}")
        written = used(cluster)
        file_bytes = FILE_KIB * 1024
        assert all(written[node] >= purged[node] + FILES * file_bytes for node in written), written
        guest.run(f"delete 0 {FILES - 1}")
        for number in range(FILES - 1):
            del guest.files[number]
        most = {node: was - (FILES - 1) * file_bytes + MIB for node, was in written.items()}
        await_used(cluster, lambda node, now: now <= most[node])
        assert guest.verify() == 1
        guest.power_off()
        assert guest.io_errors() == []
    cluster.must_be_equal("worked")
    raw = tmp_path / "exported.raw"
    cluster.hci("image", "export", name, str(raw))
    check_file_system(raw)
    assert check_files(raw, guest.files, {}) == 1
