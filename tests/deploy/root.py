"""The Debian that the hosts of these tests boot: made once, kept as an archive for later runs.

It is what an installer leaves, with sshd and sudo, and with the packages that the roles install
from Debian: hosts of tests reach no archive, so they find these there already. qemu-utils is for
the tests, which read and write images with it, as a guest would.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import subprocess
import tempfile
from pathlib import Path

RELEASE = "bookworm"
PACKAGES = (
    *("systemd", "systemd-sysv", "dbus", "openssh-server", "sudo", "iproute2", "procps"),
    *("python3", "python3-apt", "python3-packaging", "python3-venv", "ca-certificates"),
    *("etcd-server", "qemu-utils"),
)
USER = "admin"
ARCHIVE = "http://deb.debian.org/debian"
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin",
    "DEBIAN_FRONTEND": "noninteractive",
    "LC_ALL": "C.UTF-8",
}
ALONE = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
"""What is mounted meanwhile goes with the namespaces, however the command ends."""

MAKE_S = 900.0
SETTINGS = f"""\
set -eu
useradd --create-home --shell /bin/bash {USER}
echo '{USER} ALL=(ALL) NOPASSWD: ALL' >/etc/sudoers.d/{USER}
chmod 0440 /etc/sudoers.d/{USER}
install --directory --owner={USER} --mode=0700 /home/{USER}/.ssh
ssh-keygen -A
echo 'UseDNS no' >/etc/ssh/sshd_config.d/quick.conf
systemctl disable etcd.service apt-daily.timer apt-daily-upgrade.timer
rm -rf /etc/apt/sources.list /etc/machine-id /usr/share/doc /usr/share/man
touch /etc/machine-id
apt-get clean
"""


def made(cache: Path) -> Path:
    """Returns the archive of the root in a folder, made now if it is not there as it is to be."""
    what = repr((RELEASE, PACKAGES, SETTINGS))
    root = cache / f"root-{hashlib.sha256(what.encode()).hexdigest()[:12]}.tar"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not root.exists():
            for older in cache.glob("root-*.tar"):
                older.unlink()
            _make(root, cache)
    return root


def unpack(archive: Path, folder: Path) -> None:
    """Puts the root into a folder that is there and empty."""
    command = ["tar", "--extract", "--numeric-owner", "--xattrs", "--xattrs-include=*"]
    subprocess.run([*command, f"--file={archive}", f"--directory={folder}"], check=True)


def _make(root: Path, cache: Path) -> None:
    half = root.with_suffix(".half")
    packages = cache / "packages"
    packages.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="hci-debian-") as folder:
        # Nothing in a root that is thrown away need be safe from a power cut.
        quick = Path(folder, "etc/dpkg/dpkg.cfg.d/quick")
        quick.parent.mkdir(parents=True)
        quick.write_text("force-unsafe-io\n")
        debootstrap = ["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}"]
        debootstrap += [f"--cache-dir={packages}", RELEASE, folder, _mirror()]
        pack = ["tar", "--create", "--numeric-owner", "--xattrs", "--one-file-system"]
        pack += [f"--file={half}", f"--directory={folder}", "."]
        with (cache / "root.log").open("w+") as log:
            for command in (debootstrap, ["chroot", folder, "sh", "-c", SETTINGS], pack):
                done = subprocess.run(
                    [*ALONE, *command],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=ENVIRONMENT,
                    timeout=MAKE_S,
                )
                log.seek(0)
                said = f"{command[0]} failed, see {log.name}:\n{log.read()[-2000:]}"
                assert done.returncode == 0, said
    half.rename(root)


def _mirror() -> str:
    """Where this machine gets Debian's packages from."""
    for name in ("sources.list", "sources.list.d/debian.sources"):
        path = Path("/etc/apt", name)
        if not path.exists():
            continue
        line = r"^(?:deb|URIs:)\s+(?:\[.*?\]\s+)?(https?://\S+/debian)/?\s"
        found = re.search(line, path.read_text(), re.MULTILINE)
        if found:
            return found[1]
    return ARCHIVE
