"""What the protocol tests share: an NBD export to talk to, and foreign peers to talk to it with.

The tests know the server only by URIs that `new_export` hands out, so that they can be tried on a
server that others wrote (`NBD_TEST_URI`), and the peers by name, so that they can be tried with
newer ones than the system's (`NBD_TEST_TOOLS`, a folder of programs).
"""

import os
import shutil
import subprocess
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from tests.devcluster import DevCluster
from tests.protocol.newer_peers import NEWER, SYSTEM, are_fetched, kinds, newer_peers

GIB = 1 << 30
# Foreign tools are the system's, also where a virtual environment has others of the same names.
_FOLDERS = (os.environ.get("NBD_TEST_TOOLS"), "/usr/bin", os.environ.get("PATH"))
SYSTEM_ENVIRONMENT = {
    **os.environ,
    "PATH": ":".join(folder for folder in _FOLDERS if folder),
    "LC_ALL": "C",
}

Run = Callable[..., str]
NewExport = Callable[[int], str]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Names the peers' versions once a run: what a test proves, it proves for these."""
    terminalreporter.section("NBD peers")
    for command in ("qemu-img", "nbdkit", "nbdinfo", "fio"):
        terminalreporter.write_line(f"{command}: {_version(command)}")
    if NEWER in kinds() and are_fetched():
        for command in ("qemu-img", "nbdinfo"):
            newer = str(newer_peers() / command)
            terminalreporter.write_line(f"newer {command}: {_version(newer)}")


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
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a foreign tool and returns what it printed; a failure shows everything it said.

    `timeout_s` is a hang detector. With `fails=True` the tool has to fail, and its stderr is
    returned. In modules marked `newer_peers.WITH_NEWER` one that is newer than the system's, too.
    """
    path = SYSTEM_ENVIRONMENT["PATH"]
    if getattr(request, "param", SYSTEM) == NEWER:
        path = f"{newer_peers()}:{path}"

    def run_tool(*command: str | Path, timeout_s: float = 120, fails: bool = False) -> str:
        program = shutil.which(command[0], path=path)
        assert program is not None, f"{command[0]} is not installed"
        done = subprocess.run(
            [program, *(str(word) for word in command[1:])],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env={**SYSTEM_ENVIRONMENT, "PATH": path},
        )
        said = f"{program} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
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
