"""QEMU's tools and libnbd of a newer Debian than this one, run where they are unpacked.

Peers change: what a server is asked for by the tools of a stable distribution is not what guests of
newer hosts ask for. The packages come from the same mirror as the system's own, are checked with
Debian's keys, and are not installed. Owns a folder of the cache, whole or not there.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tempfile
from pathlib import Path

import pytest

SYSTEM, NEWER = "system", "newer"
CACHE = Path(__file__).resolve().parents[2] / ".cache" / "newer-peers"
RELEASE = "trixie"
KEYRINGS = tuple(Path("/usr/share/keyrings").glob("debian-archive-keyring.*"))
PACKAGES = ("qemu-utils", "libnbd-bin", "python3-libnbd")
# Of all that these depend on: what is theirs, and no more than a program needs to be loaded.
WANTED = re.compile(r"(lib|zlib|qemu-utils$|python3)")
TOOLS = ("qemu-img", "qemu-io", "qemu-nbd", "qemu-storage-daemon", "nbdcopy", "nbdinfo", "nbdfuse")
LIBRARIES = "usr/lib/x86_64-linux-gnu"
EXTENDED_SINCE = (8, 2)
"""QEMU's client asks for extended headers since then."""
APT_CONF = """
Dir::Etc::SourceList "{scratch}/sources.list";
Dir::Etc::SourceParts "-";
Dir::State "{scratch}/state";
Dir::State::Status "/dev/null";
Dir::Cache "{scratch}/cache";
APT::Architecture "amd64";
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
"""


class PeersError(Exception):
    """The packages cannot be had; the message says why."""


def are_the_systems() -> bool:
    """Whether the tools that are installed are as new."""
    said = subprocess.run(["qemu-img", "--version"], capture_output=True, text=True).stdout
    found = re.search(r"version (\d+)\.(\d+)", said)
    return found is not None and (int(found[1]), int(found[2])) >= EXTENDED_SINCE


def kinds() -> list[str]:
    """Which tools tests that may have both are run with."""
    return [SYSTEM] if "NBD_TEST_TOOLS" in os.environ or are_the_systems() else [SYSTEM, NEWER]


WITH_NEWER = pytest.mark.parametrize("run", kinds(), indirect=True, scope="session")
"""Has each test of a module run with the system's tools and, where they are older, with these."""


def are_fetched(cache: Path = CACHE) -> bool:
    """Whether they need not be fetched any more."""
    return (cache / RELEASE).exists()


def newer_peers(cache: Path = CACHE) -> Path:
    """A folder with the tools, and a `python3` that has libnbd's binding; raises PeersError."""
    folder = cache / RELEASE
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="fetch-", dir=cache) as scratch:
            fresh = _fetch(Path(scratch), folder)
            try:
                fresh.rename(folder)
            except OSError:
                # Another process was faster; its files are as good.
                if not folder.exists():
                    raise
    return folder / "bin"


def _fetch(scratch: Path, folder: Path) -> Path:
    """Unpacks the packages; `folder` is where they will be."""
    for name in ("state/lists/partial", "cache/archives/partial", "archives"):
        (scratch / name).mkdir(parents=True)
    if not KEYRINGS:
        raise PeersError("Debian's keys are not installed (debian-archive-keyring)")
    source = f"deb [signed-by={KEYRINGS[0]}] {_mirror()} {RELEASE} main\n"
    (scratch / "sources.list").write_text(source)
    (scratch / "apt.conf").write_text(APT_CONF.format(scratch=scratch))
    environment = {"APT_CONFIG": str(scratch / "apt.conf")}
    _run(["apt-get", "update"], environment)
    quietly = ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")
    depends = _run(
        ["apt-cache", "depends", "--recurse", *(f"--no-{kind}" for kind in quietly), *PACKAGES],
        environment,
    )
    named = set(re.findall(r"^([a-z0-9]\S*)", depends, re.MULTILINE))
    wanted = sorted(name for name in named if ":" not in name and WANTED.match(name))
    _run(["apt-get", "download", *wanted], environment, scratch / "archives")
    fresh = scratch / "peers"
    fresh.mkdir()
    for archive in sorted((scratch / "archives").iterdir()):
        _run(["dpkg-deb", "-x", str(archive), str(fresh / "root")], {})
    _write_starters(fresh / "bin", folder / "root")
    return fresh


def _mirror() -> str:
    targets = _run(
        ["apt-get", "indextargets", "--format", "$(ORIGIN) $(CODENAME) $(REPO_URI)",
         "Created-By: Packages"],
        {},
    )  # fmt: skip
    for line in targets.splitlines():
        origin, codename, uri = line.split(" ", 2)
        if origin == "Debian" and "-" not in codename:
            return uri
    raise PeersError("apt knows no mirror of Debian")


def _write_starters(folder: Path, root: Path) -> None:
    """Scripts that start each program with the libraries of its own release."""
    folder.mkdir()
    libraries = root / LIBRARIES
    loader = [str(libraries / "ld-linux-x86-64.so.2"), "--library-path", str(libraries)]
    python = [f"PYTHONHOME={root}/usr", f"PYTHONPATH={root}/usr/lib/python3/dist-packages"]
    commands = {name: [*loader, str(root / "usr/bin" / name)] for name in TOOLS}
    commands["python3"] = ["env", *python, *loader, str(root / "usr/bin/python3")]
    for name, command in commands.items():
        (folder / name).write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
        (folder / name).chmod(0o755)


def _run(command: list[str], environment: dict[str, str], folder: Path | None = None) -> str:
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "LC_ALL": "C", **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )
    except FileNotFoundError as missing:
        raise PeersError(f"{command[0]} is not installed: {missing}") from missing
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise PeersError(f"{' '.join(command[:3])} failed: {last}")
    return done.stdout
