"""What the protocol tests share: an NBD export to talk to, and foreign peers to talk to it with.

The tests know the server only by URIs that `new_export` hands out. Here an `nbdkit` per export
stands behind them, so that the tests can be tried on a server that others wrote. `NBD_TEST_URI`
names an export of 1 GiB to test instead; its content is overwritten.
"""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

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


@pytest.fixture(scope="session")
def new_export(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NewExport]:
    """Makes exports: a size in bytes becomes the URI of a new one, all zero, on a unix socket."""
    given = os.environ.get("NBD_TEST_URI")
    servers: list[subprocess.Popen[bytes]] = []

    def make(size_bytes: int) -> str:
        if given is not None:
            if size_bytes > GIB:
                pytest.skip("the export that NBD_TEST_URI names may be too small")
            return given
        folder = tmp_path_factory.mktemp("nbd")
        name = f"vms/disk{len(servers)}"
        servers.append(_start_nbdkit(folder / "sock", name, size_bytes))
        return f"nbd+unix:///{name}?socket={folder / 'sock'}"

    yield make
    for server in servers:
        server.terminate()
        server.wait(timeout=30)


def _start_nbdkit(socket: Path, name: str, size_bytes: int) -> subprocess.Popen[bytes]:
    command = [
        # One thread: with more, a client that vanishes can end nbdkit 1.32 by an assertion.
        *("nbdkit", "--foreground", "--exit-with-parent", "--threads=1", f"--unix={socket}"),
        *("--filter=exportname", "--filter=blocksize-policy", "memory", str(size_bytes)),
        *(f"exportname={name}", "exportname-strict=true", "exportname-list=explicit"),
        *("blocksize-minimum=1", "blocksize-preferred=4096", "blocksize-maximum=32M"),
        "blocksize-error-policy=error",
    ]
    server = subprocess.Popen(command, env=SYSTEM_ENVIRONMENT)
    deadline = time.monotonic() + 30
    while not socket.exists():
        assert server.poll() is None, "nbdkit ended at once"
        assert time.monotonic() < deadline, "nbdkit does not listen"
        time.sleep(0.01)
    return server


@pytest.fixture(scope="module")
def nbd_uri(new_export: NewExport) -> str:
    """URI of a 1 GiB export that the tests of one file share; what it holds is theirs."""
    return new_export(GIB)
