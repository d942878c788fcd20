"""A development cluster of its own, driven only through the command line as a person would.

Owns one temporary folder with the whole cluster in it and promises to leave nothing of it behind:
not a file, not a process, also where this process is killed. Never imports the product: what is
tested here is what users touch.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

from tests import reaper
from tests.prepared import Prepared

POOL = "vms"
COMMAND_TIMEOUT_S = 120.0
GONE_TIMEOUT_S = 20.0
# A hang detector: no budget of the product is this long.
HEALTH_TIMEOUT_S = 60.0


class CommandError(Exception):
    """`hci` ended with an error; the message is what it said."""

    def __init__(self, arguments: tuple[str, ...], done: subprocess.CompletedProcess[str]) -> None:
        self.exit_code = done.returncode
        self.stderr = done.stderr.strip()
        said = self.stderr or done.stdout.strip() or "nothing"
        super().__init__(f"hci {' '.join(arguments)}: exit {self.exit_code}: {said}")


def hci_program() -> Path:
    """The `hci` of the virtual environment that runs this."""
    return Path(sys.executable).parent / "hci"


class DevCluster:
    """`hci dev start` in a folder of its own; use as a context manager.

    `directory` given: the folder is the caller's and stays, stopped.
    """

    def __init__(
        self,
        *,
        nodes: int = 3,
        gateways: int = 1,
        arbiter: bool = False,
        directory: Path | None = None,
    ) -> None:
        self._own_directory = directory is None
        # Short, since a Unix socket's path has at most 107 bytes.
        self.directory = directory or Path(tempfile.mkdtemp(prefix="hci-"))
        reaper.watch(self.directory, remove=self._own_directory)
        self.config = self.directory / "hci.toml"
        self.arbiter = arbiter
        self.nodes = [f"node{number + 1}" for number in range(nodes)]
        self.gateways = [f"gateway{number + 1}" for number in range(gateways)]
        self._prepared: Prepared | None = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self.print_logs()
        self.close()

    # The command line.

    def try_hci(
        self, *arguments: str, timeout_s: float = COMMAND_TIMEOUT_S
    ) -> subprocess.CompletedProcess[str]:
        """Runs `hci` on this cluster and returns how it ended, whatever that is."""
        return subprocess.run(
            self.command(*arguments),
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    def command(self, *arguments: str) -> list[str]:
        """The command line of an `hci` call, to be run with `environment`."""
        return [*self.around(), str(hci_program()), *arguments]

    def around(self) -> list[str]:
        """What stands before a command that is to reach the cluster."""
        return []

    def hci(self, *arguments: str, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        """Runs `hci` on this cluster; returns its output, raises CommandError if it failed."""
        done = self.try_hci(*arguments, timeout_s=timeout_s)
        if done.returncode != 0:
            raise CommandError(arguments, done)
        return done.stdout

    def json(self, *arguments: str) -> Any:
        """The parsed answer of a command with `--json`, which must succeed."""
        return json.loads(self._quickly(*arguments, "--json"))

    def _quickly(self, *arguments: str) -> str:
        done = self._ask(arguments)
        if done.returncode != 0:
            raise CommandError(arguments, done)
        return done.stdout

    def _ask(self, arguments: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        """Runs an `hci` as `try_hci` does, but in a process that has its imports behind it."""
        if self._prepared is None:
            self._prepared = Prepared(self.around(), self.environment())
        return self._prepared.run(arguments, COMMAND_TIMEOUT_S)

    def environment(self) -> dict[str, str]:
        """What makes a command choose this cluster and print plainly."""
        plain = {"NO_COLOR": "1", "COLUMNS": "200", "TERM": "dumb", "LC_ALL": "C.UTF-8"}
        return {**os.environ, **plain, "HCI_CONFIG": str(self.config)}

    # The cluster.

    def start(self) -> None:
        """Starts the cluster, for the first time or again; returns when it is healthy."""
        self.hci(
            *("dev", "start", str(self.directory)),
            *("--nodes", str(len(self.nodes)), "--gateways", str(len(self.gateways))),
            *(("--arbiter",) if self.arbiter else ()),
        )

    @contextlib.contextmanager
    def configured(self, more: str, *members: str) -> Iterator[None]:
        """Adds to the configuration, and has these members run under it meanwhile."""
        before = self.config.read_text()
        self.config.write_text(f"{before}\n{more}")
        self._start_again(members)
        try:
            yield
        finally:
            self.config.write_text(before)
            self._start_again(members)

    def shorten_logs(self) -> None:
        """Has nodes keep little in their logs, so that data soon lies in files of shards."""
        for node in self.nodes:
            self.kill(node)
        text = self.config.read_text()
        for node in self.nodes:
            text = text.replace(f"[node.{node}]\n", f'[node.{node}]\nlog_bytes = "16M"\n')
        self.config.write_text(text)
        for node in self.nodes:
            self.run(node)
        self.await_health("ok")

    def _start_again(self, members: Iterable[str]) -> None:
        for member in members:
            self.kill(member)
            self.run(member)

    def kill(self, member: str) -> None:
        """SIGKILLs a member, or `all`; nothing starts it again by itself."""
        self._quickly("dev", "kill", member)

    def run(self, member: str) -> None:
        """Starts a killed member, or `all`, again."""
        self._quickly("dev", "run", member)

    def members(self) -> dict[str, dict[str, Any]]:
        """Name to `{name, kind, pid, state, data_dir, log}`."""
        listed: list[dict[str, Any]] = self.json("dev", "status")["members"]
        return {member["name"]: member for member in listed}

    def health(self) -> str:
        """`ok`, `healing`, `degraded` or `unavailable`."""
        return str(self.json("status")["health"])

    def await_health(self, *wanted: str, timeout_s: float = HEALTH_TIMEOUT_S) -> str:
        """Waits until the cluster's health is one of `wanted`; raises TimeoutError if never."""
        deadline = time.monotonic() + timeout_s
        while (health := self.health()) not in wanted:
            if time.monotonic() > deadline:
                raise TimeoutError(f"health is {health}, not {wanted}\n{self.hci('status')}")
            time.sleep(0.2)
        return health

    def await_nodes(self, state: str, *names: str, timeout_s: float = HEALTH_TIMEOUT_S) -> None:
        """Waits until every named node is listed in `state`; raises TimeoutError if never."""
        deadline = time.monotonic() + timeout_s
        while True:
            states = {node["name"]: node["state"] for node in self.json("node", "ls")}
            if all(states.get(name) == state for name in names):
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"nodes are {states}; wanted {state} for {names}")
            time.sleep(0.2)

    # Images, by their name inside the pool.

    def create(self, image: str, size: str) -> str:
        """Creates an image in the pool; returns its full name."""
        self._quickly("image", "create", f"{POOL}/{image}", size)
        return f"{POOL}/{image}"

    def remove(self, image: str) -> None:
        """Deletes an image."""
        self.hci("image", "rm", f"{POOL}/{image}")

    def info(self, image: str) -> dict[str, Any]:
        """What `hci image info --json` says."""
        answer: dict[str, Any] = self.json("image", "info", f"{POOL}/{image}")
        return answer

    def leftovers(self) -> list[dict[str, Any]]:
        """What `hci cluster leftovers --json` lists."""
        listed: list[dict[str, Any]] = self.json("cluster", "leftovers")["leftovers"]
        return listed

    def check(self, image: str) -> dict[str, Any]:
        """What `hci image check --json` says; it may exit non-zero where replicas differ.

        Raises CommandError where it could not compare.
        """
        done = self._ask(("image", "check", f"{POOL}/{image}", "--json"))
        if not done.stdout:
            raise CommandError(("image", "check"), done)
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def must_be_equal(self, image: str) -> None:
        """Asserts that `hci image check` compared all nodes in sync, and found them equal.

        A node that was just started answers a moment later, as an etcd does whose lines were just
        mended, and one that was away may be let in while the check runs: all are asked again.
        """
        deadline = time.monotonic() + HEALTH_TIMEOUT_S
        while True:
            try:
                before = self._in_sync(image)
                report = self.check(image)
                settled = not report["missing"] and self._in_sync(image) == before
            except CommandError:
                if time.monotonic() >= deadline:
                    raise
            else:
                if settled or time.monotonic() >= deadline:
                    break
            time.sleep(0.2)
        assert report["equal"], report
        assert report["compared"] == before, report

    def _in_sync(self, image: str) -> list[list[str]]:
        """Of each replica set, the nodes that its record says are in sync now."""
        info = self.info(image)
        stale = {(entry["replica_set"], entry["node"]) for entry in info["stale"]}
        return [
            [node for node in nodes if (index, node) not in stale]
            for index, nodes in enumerate(info["replica_sets"])
        ]

    def url(self, image: str) -> str:
        """The image's NBD URI as `hci image url` prints it."""
        return self._quickly("image", "url", f"{POOL}/{image}").strip()

    def url_at(self, gateway: str, image: str) -> str:
        """The image's NBD URI at a gateway of one's choice."""
        return f"nbd+unix:///{POOL}/{quote(image)}?socket={self.gateway_socket(gateway)}"

    def gateway_socket(self, gateway: str) -> str:
        """The Unix socket that a gateway's NBD clients use, from the cluster's config."""
        config = tomllib.loads(self.config.read_text())
        return str(config["gateway"][gateway]["nbd_socket"])

    # The end.

    def mend(self) -> None:
        """Runs what was killed and deletes all images; raises TimeoutError if all is not well.

        Nodes have confirmed the deletions then: one that the next test kills owes nothing.
        """
        if any(member["state"] != "running" for member in self.members().values()):
            self.run("all")
        deadline = time.monotonic() + HEALTH_TIMEOUT_S
        while images := self.json("image", "ls"):
            for image in images:
                # One that was just left is closed in a moment, and cannot be deleted before.
                done = self._ask(("image", "rm", image["name"], "--with-snapshots"))
                if done.returncode != 0 and time.monotonic() > deadline:
                    raise TimeoutError(done.stderr)
        self.await_health("ok")
        while left := self.leftovers():
            if time.monotonic() > deadline:
                raise TimeoutError(f"left over: {left}")

    def close(self) -> None:
        """Stops everything and deletes what it kept; a leftover process is ended by force."""
        with _sigint_ignored():
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                if self.config.exists():
                    self.try_hci("dev", "stop", timeout_s=60)
            if self._prepared is not None:
                self._prepared.close()
            self._kill_what_is_left()
            if self._own_directory:
                shutil.rmtree(self.directory, ignore_errors=True)
            reaper.forget(self.directory)

    def _kill_what_is_left(self) -> None:
        """What was killed is there for a moment yet, on a busy machine for a longer one."""
        deadline = time.monotonic() + GONE_TIMEOUT_S
        while (left := self.processes()) and time.monotonic() < deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def processes(self) -> list[int]:
        """Every process whose command line or environment names this cluster's folder."""
        found = []
        needle = os.fsencode(self.directory)
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            with contextlib.suppress(OSError):
                if needle in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
        return sorted(found)

    def print_logs(self, lines: int = 20) -> None:
        """Prints the end of every member's log, for a failed test's report."""
        with contextlib.suppress(Exception):
            for member in self.members().values():
                print(f"--- {member['name']} ({member['state']}, {member['log']})")
                log = Path(member["log"]).read_text(errors="replace")
                print("\n".join(log.splitlines()[-lines:]))


@contextlib.contextmanager
def _sigint_ignored() -> Iterator[None]:
    """A second Ctrl-C must not stop the cleaning up that the first one began."""
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # not the main thread, which gets no Ctrl-C
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def used_bytes(info: Mapping[str, Any]) -> int:
    """The physical bytes of the node that uses most for an image."""
    return max((int(used) for used in info["used_bytes"].values()), default=0)
