"""What is handed out: the sources with all that it takes to build, the wheel without any Rust."""

from __future__ import annotations

import os
import subprocess
import tarfile
import tomllib
from fnmatch import fnmatchcase
from pathlib import Path

PROJECT = Path(__file__).parents[2]
MADE = {"target", "__pycache__"}
WHEEL_HAS = {"__init__.py", "_engine.pyi", "py.typed"}
"""Of `engine/`, beside the compiled module, which is no source."""


def sources(*packages: str) -> set[str]:
    """The files of these folders that were not made here, but for those that only git reads."""
    found = set()
    for package in packages:
        for folder, folders, files in os.walk(PROJECT / package):
            folders[:] = [name for name in folders if name not in MADE]
            found |= {
                Path(folder, name).relative_to(PROJECT).as_posix()
                for name in files
                if not name.startswith(".git") and not name.endswith(".so")
            }
    return found


def settings() -> dict[str, list[dict[str, str | list[str]]]]:
    found: dict[str, list[dict[str, str | list[str]]]] = tomllib.loads(
        (PROJECT / "pyproject.toml").read_text()
    )["tool"]["maturin"]
    return found


def test_sdist_has_every_source_and_no_tests(tmp_path: Path) -> None:
    path = f"{os.environ.get('PATH', '')}:{Path.home() / '.cargo' / 'bin'}"
    manifest = ["--manifest-path", "engine/py/Cargo.toml", "--out", str(tmp_path)]
    subprocess.run(
        [PROJECT / ".venv" / "bin" / "maturin", "sdist", *manifest],
        cwd=PROJECT,
        env={**os.environ, "PATH": path},
        check=True,
        timeout=300,
    )
    (packed,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(packed) as archive:
        members = {name.partition("/")[2] for name in archive.getnames()}
    wanted = sources(*(str(each) for each in settings()["python-packages"]))
    # The fuzz targets are a workspace of their own.
    wanted = {name for name in wanted if not name.startswith("engine/fuzz/")}
    assert "engine/core/src/lib.rs" in wanted
    assert (wanted | {"LICENSE", "CHANGELOG.md", "pyproject.toml"}) - members == set()
    assert {name for name in members if name.split("/")[0] in ("tests", "bench")} == set()
    assert {name for name in members if name.endswith(".so") or "/target/" in name} == set()


def test_wheel_leaves_out_all_of_the_engine_but_its_stubs() -> None:
    # A wheel takes minutes to build: the patterns are compared with what is there.
    patterns = [
        str(each["path"]) for each in settings()["exclude"] if "wheel" in (each["format"] or "")
    ]
    taken = {
        name
        for name in sources("engine")
        if not any(fnmatchcase(name, pattern) for pattern in patterns)
    }
    assert taken == {f"engine/{name}" for name in WHEEL_HAS}
