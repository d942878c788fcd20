"""The guest's disk and its initial RAM disk, made of plain files without root or mounts.

The disk is one ext4 file system without a partition table: what a guest writes there can be judged
from outside with e2fsck and debugfs. Kernel and initial RAM disk are handed to QEMU.
"""

from __future__ import annotations

import shutil
import stat
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.guest.kernel import (
    GuestBuildError,
    GuestParts,
    Installation,
    database_files,
    guest_parts,
)

INIT = Path(__file__).with_name("init.sh")
FOLDERS = (
    *("bin", "sbin", "dev", "proc", "sys", "tmp", "data", "journal", "etc", "var/log"),
    *("var/lib/dpkg/info", "var/lib/dpkg/updates", "var/lib/dpkg/alternatives"),
)
BOOT = """#!/bin/busybox sh
# Loads the disk's driver and hands over to the disk's own init.
/bin/busybox mount -t devtmpfs dev /dev
for module in {modules}; do /bin/busybox insmod /modules/$module; done
tries=0
while [ ! -b /dev/vda ] && [ $tries -lt 100 ]; do /bin/busybox sleep 0.1; tries=$((tries + 1)); done
/bin/busybox mount -t ext4 -o errors=remount-ro /dev/vda /root
exec /bin/busybox switch_root /root /sbin/init
"""


@dataclass(frozen=True)
class GuestSystem:
    """What QEMU needs to boot the guest, besides the disk behind its NBD URI."""

    kernel: Path
    initrd: Path
    disk: Path  # qcow2, to be imported


def build_guest(
    directory: Path,
    *,
    size: str = "1G",
    database: bool = False,
    install: Installation | None = None,
) -> GuestSystem:
    """Makes disk and initial RAM disk in `directory`; raises GuestBuildError where it cannot.

    With `database`, sqlite3 is on the disk; with `install`, dpkg and packages that wait for it.
    """
    parts = guest_parts()
    directory.mkdir(parents=True, exist_ok=True)
    initrd = directory / "initrd.cpio"
    initrd.write_bytes(_initial_ram_disk(parts))
    disk = directory / "guest.qcow2"
    more = database_files() if database else {}
    if install is not None:
        more |= install.program_files
        more |= {f"packages/{archive.name}": archive for archive in install.packages}
    _root_disk(parts, disk, size, more)
    return GuestSystem(parts.kernel, initrd, disk)


def _root_disk(parts: GuestParts, disk: Path, size: str, more: Mapping[str, Path]) -> None:
    with tempfile.TemporaryDirectory(prefix="root-", dir=disk.parent) as scratch:
        root = Path(scratch) / "root"
        for name in FOLDERS:
            (root / name).mkdir(parents=True)
        shutil.copy(parts.busybox, root / "bin" / "busybox")
        (root / "bin" / "busybox").chmod(0o755)
        for applet in _output([str(parts.busybox), "--list"]).split():
            if applet != "busybox":
                (root / "bin" / applet).symlink_to("busybox")
        for place, path in more.items():
            (root / place).parent.mkdir(parents=True, exist_ok=True)
            (root / place).unlink(missing_ok=True)  # a link to busybox, for a program of that name
            shutil.copy(path, root / place)
        shutil.copy(INIT, root / "sbin" / "init")
        (root / "sbin" / "init").chmod(0o755)
        raw = Path(scratch) / "root.raw"
        # Without a lazily initialised inode table the guest does not go on writing it by itself.
        _output(
            [
                *("mke2fs", "-q", "-t", "ext4", "-L", "guest", "-d", str(root)),
                *("-E", "lazy_itable_init=0,root_owner=0:0", str(raw), size),
            ]
        )
        _output(["qemu-img", "convert", "-q", "-O", "qcow2", str(raw), str(disk)])


def _initial_ram_disk(parts: GuestParts) -> bytes:
    """An uncompressed newc archive (the kernel's Documentation/driver-api/early-userspace)."""
    archive = bytearray()
    for directory in ("bin", "dev", "modules", "root"):
        _append(archive, directory, stat.S_IFDIR | 0o755, b"")
    _append(archive, "dev/console", stat.S_IFCHR | 0o600, b"", device=(5, 1))
    _append(archive, "bin/busybox", stat.S_IFREG | 0o755, parts.busybox.read_bytes())
    for module in parts.modules:
        _append(archive, f"modules/{module.name}", stat.S_IFREG | 0o644, module.read_bytes())
    boot = BOOT.format(modules=" ".join(module.name for module in parts.modules))
    _append(archive, "init", stat.S_IFREG | 0o755, boot.encode())
    _append(archive, "TRAILER!!!", 0, b"")
    return bytes(archive)


def _append(
    archive: bytearray, name: str, mode: int, content: bytes, device: tuple[int, int] = (0, 0)
) -> None:
    inode = len(archive)  # unique, which is all that is asked of it
    fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(name) + 1, 0)
    archive += b"070701" + b"".join(b"%08X" % field for field in fields)
    archive += name.encode() + b"\0"
    archive += bytes(-len(archive) % 4)
    archive += content
    archive += bytes(-len(archive) % 4)


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except FileNotFoundError as missing:
        raise GuestBuildError(f"{command[0]} is not installed: {missing}") from missing
    if done.returncode != 0:
        raise GuestBuildError(f"{command[0]} failed: {done.stderr.strip()}")
    return done.stdout
