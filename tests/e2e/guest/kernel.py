"""The guest's kernel, modules, shell and programs, from Debian's packages without installing them.

Owns the cache directory: a set of files is either there whole or not at all, and is fetched once.
Refuses machines that are not amd64 Debian relatives, since the kernel package is theirs.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(__file__).resolve().parents[3] / ".cache" / "guest"
KERNEL_META_PACKAGE = "linux-image-cloud-amd64"
SHELL_PACKAGE = "busybox-static"
DATABASE_PACKAGE = "sqlite3"
INSTALLED_PACKAGE = "perl"
SCRIPT_SHELL_PACKAGE = "dash"
# What dpkg itself consists of in the guest, by where it lies in its packages.
INSTALLER_FILES = (
    *("bin/dpkg*", "bin/update-alternatives", "share/dpkg/**/*", "bin/tar", "sbin/ldconfig"),
)
# What the guest needs beyond what is built into the cloud kernel (ext4 is): its disk.
WANTED_MODULES = ("virtio_pci", "virtio_blk")


class GuestBuildError(Exception):
    """The guest could not be built; the message says what to do about it."""


@dataclass(frozen=True)
class GuestParts:
    """Files of one built guest system: all of them exist."""

    kernel: Path
    busybox: Path
    modules: tuple[Path, ...]  # in the order in which they must be loaded


@dataclass(frozen=True)
class Installation:
    """What a guest needs to install packages: dpkg, and the packages."""

    program_files: dict[str, Path]  # by where they belong in the guest
    packages: tuple[Path, ...]


def guest_parts(cache: Path = CACHE) -> GuestParts:
    """The kernel, its modules and busybox, fetched into `cache` if they are not there yet.

    Raises GuestBuildError where the packages cannot be had.
    """
    parts = _cached(cache, "parts", _fetch)
    names = (parts / "modules" / "order").read_text().split()
    modules = tuple(parts / "modules" / name for name in names)
    return GuestParts(parts / "vmlinuz", parts / "busybox", modules)


def database_files(cache: Path = CACHE) -> dict[str, Path]:
    """The sqlite3 program and the libraries that it needs, by where they belong in the guest.

    Fetched like the other parts; raises GuestBuildError where the packages cannot be had.
    """
    return _by_place(_cached(cache, "database", _fetch_database))


def installation(cache: Path = CACHE) -> Installation:
    """Dpkg with what it needs, and Perl's packages with those that they depend on.

    Fetched like the other parts; raises GuestBuildError where the packages cannot be had.
    """
    parts = _cached(cache, "installation", _fetch_installation)
    archives = tuple(sorted((parts / "archives").iterdir()))
    return Installation(_by_place(parts / "program"), archives)


def _cached(cache: Path, name: str, fetch: Callable[[Path], Path]) -> Path:
    """A folder of the cache; `fetch` makes it in a folder for scratch where it is not there yet."""
    parts = cache / name
    if not parts.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="fetch-", dir=cache) as scratch:
            fresh = fetch(Path(scratch))
            try:
                fresh.rename(parts)
            except OSError:
                # Another process was faster; its files are as good.
                if not parts.exists():
                    raise
    return parts


def _by_place(folder: Path) -> dict[str, Path]:
    return {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}


def _fetch_database(scratch: Path) -> Path:
    tree = _unpacked(scratch, _database_packages)
    program = _only(tree, "bin/sqlite3")
    found = {"bin/sqlite3": program, **_libraries(tree, [program])}
    return _copied(found, scratch / "database")


def _fetch_installation(scratch: Path) -> Path:
    tree = _unpacked(scratch, lambda: [*_installers_packages(), *_installed_packages()])
    found = {}
    for prefix in (tree, tree / "usr"):
        for path in (path for pattern in INSTALLER_FILES for path in prefix.glob(pattern)):
            if path.is_file() and not path.is_symlink():
                found[f"usr/{path.relative_to(prefix)}"] = path
    found["bin/sh"] = _only(tree, "bin/dash")
    fresh = scratch / "installation"
    libraries = _libraries(tree, [*found.values(), _only(tree, "bin/perl")])
    _copied({**found, **libraries}, fresh / "program")
    (fresh / "archives").mkdir()
    installed = _installed_packages()
    for archive in (scratch / "packages").glob("*.deb"):
        if archive.name.partition("_")[0] in installed:
            shutil.copy(archive, fresh / "archives" / archive.name)
    return fresh


def _installers_packages() -> list[str]:
    """Those whose files are put on the disk as they are, for dpkg to run."""
    return [*_with_dependencies("dpkg"), "libc-bin", SCRIPT_SHELL_PACKAGE]


def _installed_packages() -> list[str]:
    """Those that dpkg installs: not those that it runs with itself."""
    installers = _installers_packages()
    return [name for name in _with_dependencies(INSTALLED_PACKAGE) if name not in installers]


def _libraries(tree: Path, programs: list[Path]) -> dict[str, Path]:
    """The libraries in `tree` that programs need, by where they belong in the guest."""
    libraries = {path.name: path for path in sorted(tree.rglob("*.so*"))}
    found: dict[str, Path] = {}
    unread = list(programs)
    while unread:
        # Names of libraries stand in a program's table of strings.
        names = re.findall(rb"\0((?:lib|ld-)[\w+-]+\.so\.[\d.]+)(?=\0)", unread.pop().read_bytes())
        for name in {each.decode() for each in names} & libraries.keys():
            place = f"lib64/{name}" if name.startswith("ld-") else f"lib/x86_64-linux-gnu/{name}"
            if place not in found:
                found[place] = libraries[name]
                unread.append(libraries[name])
    return found


def _copied(files: Mapping[str, Path], folder: Path) -> Path:
    for place, path in files.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / place)
        (folder / place).chmod(0o755)
    return folder


def _database_packages() -> list[str]:
    named = _with_dependencies(DATABASE_PACKAGE)
    libraries = [name for name in named if re.match(r"lib|zlib", name)]
    return [DATABASE_PACKAGE, *libraries]


def _with_dependencies(package: str) -> list[str]:
    """A package and those that it depends on, by name."""
    depends = _run(
        [
            *("apt-cache", "depends", "--recurse", "--no-recommends", "--no-suggests"),
            *("--no-conflicts", "--no-breaks", "--no-replaces", "--no-enhances"),
            package,
        ]
    )
    named = set(re.findall(r"^([a-z0-9]\S*)", depends, re.MULTILINE))
    return sorted(name for name in named if ":" not in name)


def _unpacked(scratch: Path, wanted: Callable[[], list[str]]) -> Path:
    """The files of packages, in a folder of their own."""
    packages = scratch / "packages"
    tree = scratch / "tree"
    packages.mkdir()
    try:
        _run(["apt-get", "download", *wanted()], cwd=packages)
    except GuestBuildError:
        # The lists may never have been fetched, or name versions that are gone by now.
        _run([*_as_root(), "apt-get", "update"])
        _run(["apt-get", "download", *wanted()], cwd=packages)
    for package in sorted(packages.glob("*.deb")):
        _run(["dpkg-deb", "-x", str(package), str(tree)])
    return tree


def _fetch(scratch: Path) -> Path:
    tree = _unpacked(scratch, lambda: [_kernel_package(), SHELL_PACKAGE])
    fresh = scratch / "parts"
    (fresh / "modules").mkdir(parents=True)
    order = _load_order(tree)
    for module in order:
        shutil.copy(module, fresh / "modules" / module.name)
    (fresh / "modules" / "order").write_text("\n".join(module.name for module in order) + "\n")
    shutil.copy(_only(tree, "bin/busybox"), fresh / "busybox")
    shutil.copy(_only(tree, "boot/vmlinuz-*"), fresh / "vmlinuz")
    return fresh


def _as_root() -> list[str]:
    return [] if os.geteuid() == 0 else ["sudo", "--non-interactive"]


def _kernel_package() -> str:
    depends = _run(["apt-cache", "depends", KERNEL_META_PACKAGE])
    found = re.search(r"Depends: (linux-image-\S+-cloud-amd64\S*)", depends)
    if found is None:
        raise GuestBuildError(
            f"apt knows no package {KERNEL_META_PACKAGE}: the guest needs an amd64 Debian "
            "with its package lists up to date (apt-get update)"
        )
    return found.group(1)


def _only(tree: Path, pattern: str) -> Path:
    found = sorted(path for prefix in (tree, tree / "usr") for path in prefix.glob(pattern))
    if not found:
        raise GuestBuildError(f"the fetched packages hold no {pattern}: delete {CACHE}, try again")
    return found[0]


def _load_order(tree: Path) -> list[Path]:
    """The wanted modules with their dependencies, each after what it depends on."""
    files = {path.stem.split(".")[0].replace("-", "_"): path for path in tree.rglob("*.ko")}
    order: list[Path] = []

    def add(name: str) -> None:
        module = files.get(name)
        if module is None:
            raise GuestBuildError(f"the kernel package holds no uncompressed module {name}")
        for dependency in _depends(module):
            add(dependency)
        if module not in order:
            order.append(module)

    for name in WANTED_MODULES:
        add(name)
    return order


def _depends(module: Path) -> list[str]:
    # The `.modinfo` section is NUL-separated `key=value` text.
    found = re.search(rb"\0depends=([^\0]*)\0", module.read_bytes())
    names = found.group(1).decode() if found else ""
    return [name.replace("-", "_") for name in names.split(",") if name]


def _run(command: list[str], cwd: Path | None = None) -> str:
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
        )
    except FileNotFoundError as missing:
        raise GuestBuildError(f"{command[0]} is not installed: {missing}") from missing
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise GuestBuildError(f"{' '.join(command[:3])} failed: {last}")
    return done.stdout
