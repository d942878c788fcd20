"""The engine's own tests, which cargo builds and runs, beside the tests that mostly wait."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

MANIFEST = Path(__file__).parents[2] / "engine" / "Cargo.toml"
TIMEOUT_S = 1500


@pytest.mark.timeout(TIMEOUT_S + 60)
def test_engine_passes_its_own_tests(capfd: pytest.CaptureFixture[str]) -> None:
    # Building takes whole cores for a while, which must not starve the clusters of other tests.
    command = ["nice", "-n", "5", "cargo", "test", "--quiet", "--locked"]
    path = f"{os.environ.get('PATH', '')}:{Path.home() / '.cargo' / 'bin'}"
    done = subprocess.run(
        [*command, "--manifest-path", MANIFEST, "--package", "hci-engine-core"],
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        timeout=TIMEOUT_S,
    )
    said = capfd.readouterr()
    print(said.out, said.err, sep="\n")
    assert done.returncode == 0, "cargo test failed: what it said is below"
    assert "test result: ok" in said.out
