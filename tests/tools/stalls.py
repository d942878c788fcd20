"""How long a guest waits when something dies: measured, beside the budget that the design sets.

    python -m tests.tools.stalls [--rounds N] [--seed N] [--json FILE] [--allow FACTOR]

Runs a cluster of three hosts, and on the first of them a client that never stops reading, writing
and flushing, through QEMU's reconnecting NBD client: what it sees is what a guest sees. Each round
does each fault once, at a moment and to a victim drawn from the seed. Prints a table, writes the
same as JSON, and ends with 1 where a budget is missed or a request failed. FACTOR widens all
budgets, for machines that have other things to do.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.devcluster import POOL
from tests.faults.load import ReconnectingDisk
from tests.faults.nbd_session import NbdError, NbdSession
from tests.hosts.cluster import HostCluster
from tests.tools.load import SteadyLoad

LEASE_S = 10.0
SIZE = "256M"
SEEN_S = 0.3
"""A request that waits for longer is part of the stall under way."""
RESUME_TIMEOUT_S = 60.0
OPEN_PAUSE_S = 0.05


@dataclass(frozen=True)
class Budget:
    """A row of the design's table."""

    name: str
    title: str
    budget_s: float


@dataclass
class Row:
    """What was measured for a budget."""

    budget: Budget
    stalls_s: list[float] = field(default_factory=list)
    victims: list[str] = field(default_factory=list)

    def within(self, factor: float) -> bool:
        """Whether every round kept the budget."""
        return max(self.stalls_s) < self.budget.budget_s * factor


SNAPSHOT = Budget("snapshot", "snapshot taken", 0.1)
NODE_KILLED = Budget("node_killed", "node killed", 1.0)
NODE_SILENT = Budget("node_silent", "node silent (packets dropped)", 6.0)
GATEWAY = Budget("gateway_restart", "gateway killed, started again", 2.0)
HOST = Budget("host_lost", "host lost, reopened elsewhere", LEASE_S + 1.0)


class Measurement:
    """One cluster, and the rounds on it."""

    def __init__(self, cluster: HostCluster, seed: int, directory: Path) -> None:
        self._cluster = cluster
        self._chance = random.Random(seed)
        self._directory = directory
        self._round = 0
        budgets = (SNAPSHOT, NODE_KILLED, NODE_SILENT, GATEWAY, HOST)
        self.rows = [Row(budget) for budget in budgets]

    def round(self, *, say: Callable[[str], None]) -> None:
        """Does each fault once."""
        cluster = self._cluster
        self._round += 1
        image = f"stalls-{self._round}"
        cluster.create(image, SIZE)
        directory = self._directory / image
        directory.mkdir()
        faults = (
            self._take_snapshot,
            self._kill_node,
            self._silence_node,
            self._kill_gateway,
            self._lose_host,
        )
        with (
            ReconnectingDisk(cluster.url_at("gateway1", image), directory) as disk,
            NbdSession(disk.uri, self._round) as session,
            SteadyLoad(session, self._chance.randrange(1 << 32)) as load,
        ):
            for row, fault in zip(self.rows, faults, strict=True):
                time.sleep(self._chance.uniform(0.5, 1.5))
                victim, stall_s = fault(load, image)
                row.stalls_s.append(stall_s)
                row.victims.append(victim)
                say(f"round {self._round}: {row.budget.title}: {victim}: {stall_s:.2f} s")
            load.stop()
        # The image stays: it has a snapshot.

    def _take_snapshot(self, load: SteadyLoad, image: str) -> tuple[str, float]:
        load.begin()
        self._cluster.hci("snapshot", "create", f"{POOL}/{image}@s")
        return "-", self._stall_of(load)

    def _kill_node(self, load: SteadyLoad, image: str) -> tuple[str, float]:
        victim = self._chance.choice(self._cluster.nodes)
        load.begin()
        self._cluster.kill(victim)
        stall_s = self._stall_of(load)
        self._cluster.run(victim)
        self._level(image)
        return victim, stall_s

    def _silence_node(self, load: SteadyLoad, image: str) -> tuple[str, float]:
        # The node of the gateway's own host is reached through a socket, which loses nothing.
        victim = self._chance.choice(self._cluster.nodes[1:])
        load.begin()
        self._cluster.isolate([victim])
        # Silence is noticed after a while: until then reads and some writes are answered.
        self._await_stale(image, victim)
        stall_s = self._stall_of(load)
        self._cluster.network.mend()
        self._level(image)
        return victim, stall_s

    def _kill_gateway(self, load: SteadyLoad, image: str) -> tuple[str, float]:
        load.begin()
        self._cluster.kill("gateway1")
        self._cluster.run_together(["gateway1"])
        stall_s = self._stall_of(load)
        self._level(image)
        return "gateway1", stall_s

    def _lose_host(self, load: SteadyLoad, image: str) -> tuple[str, float]:
        """The host goes in silence, as when its power fails: nobody is told by a reset."""
        cluster = self._cluster
        host = cluster.host("host1")
        with NbdSession(cluster.url_at("gateway1", image), 1000 + self._round) as before:
            before.call("write", 0, 1, 7)
            before.call("flush")
            load.stop()
            began_s = time.monotonic()
            cluster.isolate(host)
            cluster.kill_together(host)
        with self._open_elsewhere(image) as session:
            found = session.call("read", 0, 1)
            session.call("write", 1, 1, 8)
            stall_s = time.monotonic() - began_s
            session.call("flush")
        if found != [7]:
            raise AssertionError(f"the new host reads {found} where 7 was flushed")
        cluster.network.mend()
        cluster.run("all")
        self._level(image)
        return "host1", stall_s

    def _open_elsewhere(self, image: str) -> NbdSession:
        deadline = time.monotonic() + RESUME_TIMEOUT_S
        while True:
            try:
                return NbdSession(self._cluster.url_at("gateway2", image), 1000 + self._round)
            except NbdError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(OPEN_PAUSE_S)

    def _stall_of(self, load: SteadyLoad) -> float:
        load.settle(SEEN_S, RESUME_TIMEOUT_S)
        # What was unanswered for less than that when it was asked may have become the longest.
        load.settle(SEEN_S, RESUME_TIMEOUT_S)
        return load.worst_s

    def _await_stale(self, image: str, node: str) -> None:
        deadline = time.monotonic() + RESUME_TIMEOUT_S
        while node not in {entry["node"] for entry in self._cluster.info(image)["stale"]}:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{node} is silent and is not left behind")
            time.sleep(0.1)

    def _level(self, image: str) -> None:
        self._cluster.await_health("ok", timeout_s=RESUME_TIMEOUT_S)
        assert self._cluster.info(image)["stale"] == []


def table(rows: Sequence[Row], factor: float) -> str:
    """What was measured, for people."""
    lines = [f"{'':32}{'budget':>9}{'rounds':>8}{'median':>9}{'worst':>9}"]
    for row in rows:
        verdict = "" if row.within(factor) else "  missed"
        lines.append(
            f"{row.budget.title:32}{row.budget.budget_s:7.1f} s{len(row.stalls_s):8d}"
            f"{statistics.median(row.stalls_s):7.2f} s{max(row.stalls_s):7.2f} s{verdict}"
        )
    return "\n".join(lines)


def report(rows: Sequence[Row], seed: int, factor: float) -> dict[str, Any]:
    """The same for programs."""
    return {
        "seed": seed,
        "allow": factor,
        "machine": {"system": platform.platform(), "processor": platform.machine()},
        "stalls": [
            {
                "fault": row.budget.name,
                "budget_s": row.budget.budget_s,
                "rounds_s": [round(stall_s, 3) for stall_s in row.stalls_s],
                "victims": row.victims,
                "median_s": round(statistics.median(row.stalls_s), 3),
                "worst_s": round(max(row.stalls_s), 3),
                "within_budget": row.within(factor),
            }
            for row in rows
        ],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures; returns the exit code."""
    parser = argparse.ArgumentParser(prog="make stalls", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--allow", type=float, default=1.0, metavar="FACTOR")
    options = parser.parse_args(arguments)
    seed = random.randrange(1 << 32) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    with (
        tempfile.TemporaryDirectory(prefix="hci-stalls-") as scratch,
        HostCluster(gateways=2, seed=seed) as cluster,
    ):
        measurement = Measurement(cluster, seed, Path(scratch))
        for _ in range(options.rounds):
            measurement.round(say=lambda line: print(line, flush=True))
    rows = measurement.rows
    print(f"\nThe longest that a request waited, image {POOL}/…, lease time {LEASE_S:.0f} s\n")
    print(table(rows, options.allow))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report(rows, seed, options.allow), indent=2) + "\n")
    return 0 if all(row.within(options.allow) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
