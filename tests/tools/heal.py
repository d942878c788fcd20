"""What travels in a heal, how soon one that missed nothing is in, and what guests keep meanwhile.

    python -m tests.tools.heal [--filled MIB] [--rewritten MIB] [--rounds N] [--json FILE] …

An image of 20 GiB, of which 4 GiB are filled; then a node is away while 1 GiB of those is written
anew, at random places. What the node receives while it is healed is counted at its network
device: data, checksums, frames and all. The goals are at most 1.1 times what was rewritten, and
under a second for a node that missed nothing. What a guest keeps of its speed is measured by
`guest_speed`, on a cluster of its own; the goal is 70 %. Ends with 1 where a goal is missed. Takes
about 15 GB of disk.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.devcluster import POOL
from tests.faults.nbd_session import NbdSession
from tests.hosts.cluster import HostCluster
from tests.tools import guest_speed

MIB = 1 << 20
IMAGE = "large"
IMAGE_SIZE = "20G"
VICTIM = "node3"
MOST_MOVED = 1.1
IN_SYNC_S = 1.0
LEAST_KEPT = 0.7
RATE_MIB = 128
"""A second, where the configuration says nothing."""
HEAL_TIMEOUT_S = 900.0
ROUNDS = 3
DISK_PER_FILLED = 4.5
"""Three copies, what overwrites them before it is in place, and the nodes' logs."""


class Evidence:
    """One cluster, and what is done to it."""

    def __init__(self, cluster: HostCluster, filled_mib: int, rewritten_mib: int) -> None:
        self._cluster = cluster
        self._filled_mib = filled_mib
        self._rewritten_mib = rewritten_mib
        self._uri = ""

    def gather(self) -> dict[str, Any]:
        """Does it all; returns the figures."""
        cluster = self._cluster
        cluster.hci("image", "create", f"{POOL}/{IMAGE}", IMAGE_SIZE)
        self._uri = cluster.url_at("gateway1", IMAGE)
        say(f"filling {self._filled_mib} MiB of {IMAGE_SIZE}")
        self._write("--rw=write", "--bs=1m", f"--io_size={self._filled_mib}m")
        # The image stays open, as with a guest that does nothing at the moment.
        with NbdSession(self._uri, 1):
            say(f"{VICTIM} is killed; {self._rewritten_mib} MiB are written anew, 64 KiB each")
            cluster.kill(VICTIM)
            self._write("--rw=randwrite", "--bs=64k", f"--io_size={self._rewritten_mib}m")
            healed = self._heal()
            missed_nothing = [self._come_back() for _ in range(ROUNDS)]
        cluster.await_health("ok")
        say("comparing all copies")
        cluster.must_be_equal(IMAGE)
        return {
            "image": IMAGE_SIZE,
            "filled_mib": self._filled_mib,
            "rewritten_mib": self._rewritten_mib,
            **healed,
            "missed_nothing_s": missed_nothing,
        }

    def _write(self, *options: str) -> None:
        subprocess.run(
            [
                *("fio", "--name=fill", "--direct=1", "--thread", "--ioengine=nbd", "--minimal"),
                *(f"--uri={self._uri}", f"--size={self._filled_mib}m", "--iodepth=16"),
                *("--refill_buffers", "--end_fsync=1", *options),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )

    def _heal(self) -> dict[str, Any]:
        cluster = self._cluster
        before = self._received()
        began_s = time.monotonic()
        cluster.run(VICTIM)
        started_s = time.monotonic()
        while cluster.info(IMAGE)["stale"]:
            if time.monotonic() - started_s > HEAL_TIMEOUT_S:
                raise TimeoutError(cluster.hci("heal", "status"))
            time.sleep(0.2)
        took_s = time.monotonic() - started_s
        received = self._received() - before
        copied = self._copied()
        say(f"{VICTIM} is healed after {took_s:.1f} s ({started_s - began_s:.1f} s to start)")
        say(f"  copied {copied / MIB:.1f} MiB, received {received / MIB:.1f} MiB in all")
        return {
            "copied_mib": round(copied / MIB, 1),
            "received_mib": round(received / MIB, 1),
            "heal_s": round(took_s, 2),
        }

    def _copied(self) -> int:
        """Bytes of the heal, which is over a moment after the record takes the node in."""
        deadline = time.monotonic() + HEAL_TIMEOUT_S
        while True:
            lines = self._cluster.json("heal", "status")["images"]
            of_victim = [line for line in lines if line["node"] == VICTIM]
            if of_victim and all(line["finished_at"] is not None for line in of_victim):
                return max(int(line["bytes_done"]) for line in of_victim)
            if time.monotonic() > deadline:
                raise TimeoutError(f"the heal of {VICTIM} is not over: {lines}")
            time.sleep(0.05)

    def _come_back(self) -> float:
        """Restarts the node; returns the seconds from when it serves to when it is in sync."""
        cluster = self._cluster
        gateway = Path(cluster.members()["gateway1"]["log"])
        seen = gateway.stat().st_size
        cluster.kill(VICTIM)
        cluster.run(VICTIM)
        deadline = time.monotonic() + HEAL_TIMEOUT_S
        # Left behind meanwhile, though it missed nothing, it is in sync again when it is healed.
        whole = r"(?:replicas_admitted .*shards=0|replicas_level|membership_changed .*stale=\{\})"
        while (level := moment(gateway, whole, seen)) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{VICTIM} is not let in")
            time.sleep(0.05)
        assert cluster.info(IMAGE)["stale"] == []
        serves = moment(Path(cluster.members()[VICTIM]["log"]), "node_started")
        assert serves is not None
        took_s = round((level - serves).total_seconds(), 3)
        say(f"{VICTIM} restarted, having missed nothing: in sync {took_s:.3f} s after it serves")
        return took_s

    def _received(self) -> int:
        """Bytes that the node's network device has received."""
        done = subprocess.run(
            [*self._cluster.network.inside(VICTIM), "cat", "/proc/net/dev"],
            check=True,
            capture_output=True,
            text=True,
        )
        found = re.search(r"eth0:\s*([0-9]+)", done.stdout)
        assert found is not None
        return int(found[1])


def moment(log: Path, event: str, since: int = 0) -> datetime | None:
    """When an event was last logged after the first `since` bytes, or None."""
    with log.open("rb") as file:
        file.seek(since)
        text = file.read().decode(errors="replace")
    found = re.findall(rf"^timestamp=(\S+) .*event={event}(?!\w)", text, re.MULTILINE)
    return datetime.fromisoformat(found[-1]) if found else None


def travel(filled_mib: int, rewritten_mib: int) -> dict[str, Any]:
    """Counts what travels, on a cluster of its own."""
    with HostCluster(gateways=1) as cluster:
        return Evidence(cluster, filled_mib, rewritten_mib).gather()


def guests(rounds: int, window_s: float, rate_mib: int | None) -> Sequence[guest_speed.Row]:
    """Measures what guests keep of their speed. `rate_mib`: in place of the default of heals."""
    with HostCluster(gateways=1) as cluster, contextlib.ExitStack() as around:
        if rate_mib is not None:
            limits = f'[heal]\nbytes_per_second = "{rate_mib}M"\n'
            around.enter_context(cluster.configured(limits, "gateway1"))
        measurement = guest_speed.GuestSpeed(cluster, window_s, rate_mib or RATE_MIB, say)
        measurement.prepare()
        for _ in range(rounds):
            measurement.round()
    return measurement.rows


def say(line: str) -> None:
    """Prints a line at once."""
    print(line, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Gathers the evidence; returns the exit code."""
    parser = argparse.ArgumentParser(prog="make heal", description=__doc__.splitlines()[0])
    parser.add_argument("--filled", type=int, default=4096, metavar="MIB")
    parser.add_argument("--rewritten", type=int, default=1024, metavar="MIB")
    parser.add_argument("--rounds", type=int, default=3, help="heals of each kind beside a guest")
    parser.add_argument("--window", type=float, default=5.0, metavar="SECONDS")
    parser.add_argument(
        "--rate",
        type=int,
        default=None,
        metavar="MIB",
        help="a second, of heals; default: the product's",
    )
    parser.add_argument("--most-moved", type=float, default=MOST_MOVED, metavar="RATIO")
    parser.add_argument("--in-sync", type=float, default=IN_SYNC_S, metavar="SECONDS")
    parser.add_argument("--least-kept", type=float, default=LEAST_KEPT, metavar="RATIO")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args(arguments)
    needed = DISK_PER_FILLED * options.filled * MIB
    if shutil.disk_usage(tempfile.gettempdir()).free < needed:
        print(f"{tempfile.gettempdir()} has no {needed / 1e9:.0f} GB free", file=sys.stderr)
        return 2
    figures = travel(options.filled, options.rewritten)
    rows = guests(options.rounds, options.window, options.rate)
    figures["guest_speed"] = guest_speed.report(rows, options.least_kept)
    ratio = figures["received_mib"] / figures["rewritten_mib"]
    slowest_s = max(figures["missed_nothing_s"])
    say(f"\nreceived while healed: {ratio:.3f} of what was rewritten; goal: {options.most_moved}")
    say(
        f"in sync having missed nothing: {slowest_s:.3f} s at most; goal: under {options.in_sync} s"
    )
    say("\nIOPS of a guest, 4 KiB at random, 70 % reads, depth 32, without and beside heals\n")
    say(guest_speed.table(rows, options.least_kept))
    kept = (
        ratio <= options.most_moved
        and slowest_s < options.in_sync
        and all(row.ratio >= options.least_kept for row in rows)
    )
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
