"""The walls of the house: which package may import which, what pure code must not touch."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

MAY_IMPORT = {
    "engine": frozenset[str](),
    "shard": frozenset({"engine"}),
    "arbiter": frozenset({"shard", "engine"}),
    "etcd": frozenset({"shard", "engine"}),
    "vmstore": frozenset({"etcd", "arbiter", "shard", "engine"}),
    "hci": frozenset({"vmstore", "etcd", "arbiter", "shard", "engine"}),
}

PURE = (
    "shard/**/*.py",
    "arbiter/errors.py",
    "arbiter/exchange.py",
    "arbiter/statement.py",
    "arbiter/vote.py",
    "etcd/errors.py",
    "etcd/fields.py",
    "etcd/images.py",
    "etcd/interface.py",
    "etcd/keys.py",
    "etcd/records.py",
    "vmstore/admission_steps.py",
    "vmstore/ancestor_steps.py",
    "vmstore/ancestry.py",
    "vmstore/clone_errors.py",
    "vmstore/effects.py",
    "vmstore/errors.py",
    "vmstore/events.py",
    "vmstore/freezing.py",
    "vmstore/granting.py",
    "vmstore/heal_steps.py",
    "vmstore/healing.py",
    "vmstore/history.py",
    "vmstore/holder.py",
    "vmstore/holding.py",
    "vmstore/judging.py",
    "vmstore/layer_changes.py",
    "vmstore/merge_steps.py",
    "vmstore/merging.py",
    "vmstore/names.py",
    "vmstore/record_size.py",
    "vmstore/recovering.py",
    "vmstore/slowness.py",
    "vmstore/snapshot_errors.py",
    "vmstore/snapshot_steps.py",
    "vmstore/space.py",
    "vmstore/standing.py",
    "vmstore/stored.py",
    "vmstore/told.py",
)
"""Code that decides, and so can be run by a simulator. A module listed here may not exist yet."""

OUTSIDE = frozenset(
    """
    asyncio concurrent ctypes datetime fcntl grpc io logging mmap multiprocessing os pathlib queue
    random secrets select selectors shutil signal socket socketserver ssl structlog subprocess
    tempfile threading time
    """.split()
)
"""Sockets, threads, clocks, randomness, the system and logging."""

VAGUE_NAMES = frozenset({"utils", "util", "common", "helpers", "helper", "manager", "misc"})


def sources(*patterns: str) -> list[Path]:
    found = [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    return [path for path in found if "_pb2" not in path.name]


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that `path` imports, lazy and type-only ones too."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            yield node.lineno, ".".join([*base, *(node.module or "").split(".")]).strip(".")


def violations(path: Path, refused: frozenset[str]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for line, name in imported(path)
        if name.split(".")[0] in refused
    ]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_of_a_package_go_one_way(package: str) -> None:
    refused = frozenset(MAY_IMPORT) - MAY_IMPORT[package] - {package} | {"tests", "bench"}
    found = sources(f"{package}/**/*.py")
    assert found, f"no sources in {package}/"
    assert [line for path in found for line in violations(path, refused)] == []


def test_pure_modules_touch_nothing_outside() -> None:
    assert [line for path in sources(*PURE) for line in violations(path, OUTSIDE)] == []


def test_pure_modules_import_only_pure_ones_of_ours() -> None:
    pure = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sources(*PURE)}
    pure |= {name.removesuffix(".__init__") for name in pure} | {"engine", "etcd", "vmstore"}
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sources(*PURE)
        for line, name in imported(path)
        if name.split(".")[0] in MAY_IMPORT and name not in pure and name.split(".")[0] != "engine"
    ]
    assert wrong == []


def test_modules_have_names_that_say_what_is_in_them() -> None:
    packages = [f"{package}/**/*" for package in (*MAY_IMPORT, "tests", "bench")]
    vague = [
        str(path.relative_to(ROOT))
        for path in (p for pattern in packages for p in ROOT.glob(pattern))
        if path.stem.strip("_") in VAGUE_NAMES and "target" not in path.parts
    ]
    assert vague == []


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_modules_open_with_what_they_own(package: str) -> None:
    bare = [
        str(path.relative_to(ROOT))
        for path in sources(f"{package}/**/*.py")
        if ast.get_docstring(ast.parse(path.read_text())) is None
    ]
    assert bare == []


def test_dependencies_each_have_a_line_that_says_why() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]
    for extra in project["project"]["optional-dependencies"].values():
        listed += extra
    cargo = tomllib.loads((ROOT / "engine" / "Cargo.toml").read_text())
    names = [entry.split(">")[0].split("=")[0].split("<")[0].strip() for entry in listed]
    names += cargo["workspace"]["dependencies"]
    told = (ROOT / "docs" / "dependencies.md").read_text()
    assert [name for name in names if name not in told] == []
