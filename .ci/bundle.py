"""Packs the wheel in dist/ with all that it needs, for hosts without a compiler or internet.

    python .ci/bundle.py

Writes dist/hci-vmstore-VERSION-cp311-x86_64.tar.gz and prints its path: a folder of that name with
wheels for Debian 12, and requirements.txt, which names each by its version and checksum. The same
wheels make the same file, byte for byte: who installs it tells by its checksum what is new.
"""

import gzip
import hashlib
import platform
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
PYTHON = "3.11"
NEWEST_GLIBC = (2, 36)
"""Debian 12's."""


def main() -> None:
    """Packs the wheel of the version that stands here."""
    cargo = tomllib.loads((ROOT / "engine" / "Cargo.toml").read_text())
    version = cargo["workspace"]["package"]["version"]
    wheel = own_wheel(version)
    tag = f"cp{PYTHON.replace('.', '')}-{platform.machine()}"
    bundle = DIST / f"hci-vmstore-{version}-{tag}.tar.gz"
    with tempfile.TemporaryDirectory() as folder:
        download(wheel, Path(folder))
        wheels = sorted(Path(folder).iterdir())
        pack(wheels, bundle)
    sys.stdout.write(f"{bundle}\n")


def own_wheel(version: str) -> Path:
    """Returns the newest wheel of a version; ends where there is none that the hosts can load."""
    found = sorted(DIST.glob(f"hci_vmstore-{version}-*.whl"), key=lambda path: path.stat().st_mtime)
    if not found:
        sys.exit(f"no wheel of version {version} in {DIST}: `make wheel` builds it")
    glibc = re.search(r"manylinux_(\d+)_(\d+)_", found[-1].name)
    if glibc is None or (int(glibc[1]), int(glibc[2])) > NEWEST_GLIBC:
        sys.exit(f"{found[-1].name} needs a newer system than Debian 12: build it on Debian 12")
    return found[-1]


def download(wheel: Path, folder: Path) -> None:
    """Puts the wheel and wheels of all that it depends on into a folder."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    command += ["--only-binary=:all:", f"--python-version={PYTHON}", f"--dest={folder}", str(wheel)]
    subprocess.run(command, check=True)


def pack(wheels: list[Path], bundle: Path) -> None:
    """Writes the archive; nothing in it depends on when or by whom it is written."""
    top = bundle.name.removesuffix(".tar.gz")
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder) / "requirements.txt"
        for wheel in wheels:
            name, version = wheel.name.split("-")[:2]
            digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
            lines.append(f"{name}=={version} --hash=sha256:{digest}\n")
        requirements.write_text("".join(lines))
        half = bundle.with_suffix(".half")
        with (
            half.open("wb") as file,
            gzip.GzipFile("", "wb", 1, file, 0) as packed,
            tarfile.open(fileobj=packed, mode="w") as archive,
        ):
            for path in (requirements, *wheels):
                archive.add(path, f"{top}/{path.name}", filter=anonymous)
        half.rename(bundle)


def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Has a file be root's, readable, of no date."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = "root"
    member.mode = 0o644
    return member


if __name__ == "__main__":
    main()
