"""The network of a host cluster, as a test sees it: who reaches whom, and how well.

Every member has an address of its own, so that a line between two *members* can fail while others
between the same hosts do not. Sockets in the file system are no part of it: a gateway always
reaches the node of its own host.
"""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.hosts.line import Line
from tests.hosts.switch import NETWORK, OUTSIDE

PROJECT = Path(__file__).resolve().parents[2]
NEEDED = ("unshare", "nsenter", "ip", "bridge")


class NetworkError(Exception):
    """The namespaces cannot be made, or a line cannot be changed; the message says why."""


class Network:
    """Namespaces for `members`, connected by whole lines."""

    def __init__(self, folder: Path, members: Iterable[str], seed: int = 0) -> None:
        self.members = list(members)
        self.addresses = {
            name: f"{NETWORK}.{number}" for number, name in enumerate(self.members, start=1)
        }
        for program in NEEDED:
            if shutil.which(program) is None:
                raise NetworkError(f"`{program}` is not installed (iproute2, util-linux)")
        self._process = subprocess.Popen(
            [
                *("unshare", "--net", "--", sys.executable, "-m", "tests.hosts.switch"),
                *(str(folder), str(seed), *self.members),
            ],
            cwd=PROJECT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            self._spaces: dict[str, str] = self._answer()["spaces"]
        except BaseException:
            self.close()
            raise

    def inside(self, member: str = OUTSIDE) -> list[str]:
        """What to put before a command so that it runs where `member` does.

        It becomes that command: the process keeps its id, its files and its environment.
        """
        return ["nsenter", f"--net={self._spaces[member]}", "--"]

    def set(self, line: Line | None, sources: Iterable[str], targets: Iterable[str]) -> None:
        """Makes the line from each source to each target, that direction only, such as `line`.

        None is a whole line.
        """
        value = None if line is None else asdict(line)
        self._order(value, itertools.product(sources, targets))

    def cut(self, sources: Iterable[str], targets: Iterable[str]) -> None:
        """Drops whatever any source sends to any target, in silence."""
        self._order("cut", itertools.product(sources, targets))

    def part(self, some: Iterable[str], others: Iterable[str]) -> None:
        """Cuts both directions between each of `some` and each of `others`."""
        some, others = list(some), list(others)
        both = [*itertools.product(some, others), *itertools.product(others, some)]
        self._order("cut", both)

    def mend(self) -> None:
        """Makes every line whole."""
        everybody = [*self.members, OUTSIDE]
        self._order(None, itertools.permutations(everybody, 2))

    def close(self) -> None:
        """Ends the process that holds it; what members still run keep their namespaces."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for stream in (self._process.stdout, self._process.stderr):
            assert stream is not None
            stream.close()

    def _order(self, line: object, ways: Iterable[tuple[str, str]]) -> None:
        changes = [
            {"from": source, "to": target, "line": line}
            for source, target in ways
            if source != target
        ]
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(changes) + "\n")
        self._process.stdin.flush()
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            assert self._process.stderr is not None
            raise NetworkError(
                "this needs network namespaces, which takes root (CAP_SYS_ADMIN) and a kernel "
                f"with NET_NS, BRIDGE, VETH and TUN: {self._process.stderr.read().strip()}"
            )
        answer: dict[str, Any] = json.loads(line)
        if answer["error"] is not None:
            raise NetworkError(f"the network cannot be made so: {answer['error']}")
        return answer
