"""What the protocol tests share: an NBD export to talk to, and foreign peers to talk to it with.

The tests know the server only by URIs that `new_export` hands out, so that they can be tried on a
server that others wrote (`NBD_TEST_URI`).
"""

import os
import subprocess
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from tests.devcluster import DevCluster

GIB = 1 << 30
# Foreign tools are the system's, also where a virtual environment has others of the same names.
SYSTEM_ENVIRONMENT = {**os.environ, "PATH": f"/usr/bin:{os.environ.get('PATH', '')}", "LC_ALL": "C"}

Run = Callable[..., str]
NewExport = Callable[[int], str]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Names the peers' versions once a run: what a test proves, it proves for these."""
    terminalreporter.section("NBD peers")
    for command in ("qemu-img", "nbdkit", "nbdinfo", "fio"):
        terminalreporter.write_line(f"{command}: {_version(command)}")


def _version(command: str) -> str:
    try:
        asked = subprocess.run(
            [command, "--version"],
            capture_output=True,
            text=True,
            env=SYSTEM_ENVIRONMENT,
            timeout=30,
        )
    except FileNotFoundError:
        return "missing"
    return " ".join(asked.stdout.split("\n")[0].split())


@pytest.fixture(scope="session")
def run() -> Run:
    """Runs a foreign tool and returns what it printed; a failure shows everything it said.

    `timeout_s` is a hang detector. With `fails=True` the tool has to fail, and its stderr is
    returned.
    """

    def run_tool(*command: str | Path, timeout_s: float = 120, fails: bool = False) -> str:
        done = subprocess.run(
            [str(word) for word in command],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=SYSTEM_ENVIRONMENT,
        )
        said = f"{command[0]} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        assert (done.returncode != 0) == fails, said
        return done.stderr if fails else done.stdout

    return run_tool


@pytest.fixture(scope="module")
def new_export(request: pytest.FixtureRequest) -> NewExport:
    """Makes exports: a size in bytes becomes the URI of a new image of a cluster, all zero.

    `NBD_TEST_URI` names an export of 1 GiB to test instead; its content is overwritten.
    """
    given = os.environ.get("NBD_TEST_URI")
    if given is not None:
        return lambda size_bytes: _given(given, size_bytes)
    cluster: DevCluster = request.getfixturevalue("shared")
    numbers = count()

    def make(size_bytes: int) -> str:
        name = f"disk{next(numbers)}"
        cluster.create(name, str(size_bytes))
        return cluster.url(name)

    return make


def _given(uri: str, size_bytes: int) -> str:
    if size_bytes > GIB:
        pytest.skip("the export that NBD_TEST_URI names may be too small")
    return uri


@pytest.fixture(scope="module")
def nbd_uri(new_export: NewExport) -> str:
    """URI of a 1 GiB export that the tests of one file share; what it holds is theirs."""
    return new_export(GIB)
