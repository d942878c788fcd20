"""What part of its speed a guest keeps while images are healed: measured for `make heal`.

The guest is fio on an open image, random reads and writes of 4 KiB. While a node is away other data
is written, so much that its heal outlasts the windows in which the guest is measured. Windows with
and without a heal take turns, and the ratio of their medians counts. All nodes, etcd, the gateway
and the guest share this machine's processors and disk: on hosts of their own a heal takes less.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.devcluster import POOL, DevCluster
from tests.faults.nbd_session import NbdSession

MIB = 1 << 20
GUEST = "guest"
GUEST_MIB = 256
HEALED = ("healed1", "healed2", "healed3")
VICTIM = "node3"
START_S = 3.0
"""From the node's return until the first window heals go on without a guest."""
WINDOWS = 2
"""Before each heal, and beside it."""
HEAL_TIMEOUT_S = 120.0
SETTLE_S = 1.0
FIO_GRACE_S = 60.0


LONGER = 2
TRIES = 3
"""Where a heal ended before its window, more is written the next time."""


class TooShortError(Exception):
    """A heal ended before the guest was measured: more has to be written while the node is away."""


@dataclass(frozen=True)
class Case:
    """What is healed beside the guest."""

    name: str
    title: str
    images: tuple[str, ...]
    is_open: bool = True


CASES = (
    Case("same_image", "its own image heals", (GUEST,)),
    Case("three_open", "three other open images heal", HEALED),
    Case("two_closed", "two closed images heal", HEALED[:2], is_open=False),
)


@dataclass
class Row:
    """What was measured of a case."""

    case: Case
    without_iops: list[float] = field(default_factory=list)
    beside_iops: list[float] = field(default_factory=list)
    healed_mib_per_s: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """The part of its speed that the guest keeps."""
        return statistics.median(self.beside_iops) / statistics.median(self.without_iops)


class GuestSpeed:
    """One cluster, and the rounds on it. `rate_mib` is what `[heal]` allows without guests."""

    def __init__(
        self,
        cluster: DevCluster,
        window_s: float,
        rate_mib: int,
        say: Callable[[str], None],
        cases: Sequence[Case] = CASES,
    ) -> None:
        self._cluster = cluster
        self._window_s = window_s
        self._missed_mib = int(rate_mib * (WINDOWS * window_s + START_S))
        self._say = say
        self._fills = 0
        self.rows = [Row(case) for case in cases]

    def prepare(self) -> None:
        """Makes the images, and fills what the guest works on."""
        most_mib = self._missed_mib * LONGER ** (TRIES - 1)
        self._cluster.create(GUEST, f"{GUEST_MIB + most_mib}M")
        for image in HEALED:
            self._cluster.create(image, f"{most_mib}M")
        self._fill(GUEST, 0, GUEST_MIB)

    def round(self) -> None:
        """Measures each case once."""
        with NbdSession(self._uri(GUEST), 1):
            for row in self.rows:
                self._measure(row)

    def _measure(self, row: Row) -> None:
        for tries in range(TRIES):
            try:
                self._try(row, self._missed_mib * LONGER**tries)
            except TooShortError as error:
                self._cluster.await_health("ok", timeout_s=HEAL_TIMEOUT_S)
                if tries == TRIES - 1:
                    raise
                self._say(f"again: {error}")
            else:
                return

    def _try(self, row: Row, missed_mib: int) -> None:
        cluster, case = self._cluster, row.case
        os.sync()
        time.sleep(SETTLE_S)
        without_iops = [self._guest_iops() for _ in range(WINDOWS)]
        with self._opened(case):
            cluster.kill(VICTIM)
            each_mib = missed_mib // len(case.images)
            for image in case.images:
                self._fill(image, GUEST_MIB if image == GUEST else 0, each_mib)
            if not case.is_open:
                self._await("the images are closed", lambda: self._are_closed(case))
            cluster.run(VICTIM)
            self._await_heals(case)
            before, began_s = sum(self._heals(case).values()), time.monotonic()
            beside_iops = [self._guest_iops() for _ in range(WINDOWS)]
            heals, took_s = self._heals(case), time.monotonic() - began_s
            if len(heals) < len(case.images):
                raise TooShortError(f"{case.title}: {each_mib} MiB each are healed too soon")
            healed_mib = (sum(heals.values()) - before) / MIB
            cluster.await_health("ok", timeout_s=HEAL_TIMEOUT_S)
        row.without_iops += without_iops
        row.beside_iops += beside_iops
        row.healed_mib_per_s.append(healed_mib / took_s)
        beside, without = statistics.mean(beside_iops), statistics.mean(without_iops)
        self._say(
            f"{case.title}: {beside:,.0f} of {without:,.0f} IOPS, {beside / without:.2f};"
            f" healed {healed_mib / took_s:.1f} MiB/s meanwhile"
        )

    @contextlib.contextmanager
    def _opened(self, case: Case) -> Iterator[None]:
        with contextlib.ExitStack() as sessions:
            for image in case.images if case.is_open else ():
                if image != GUEST:
                    sessions.enter_context(NbdSession(self._uri(image), 1))
            yield

    def _are_closed(self, case: Case) -> bool:
        return all(self._cluster.info(image)["clean"] for image in case.images)

    def _heals(self, case: Case) -> dict[str, int]:
        """Bytes that are healed so far, of the heals that go on."""
        lines = self._cluster.json("heal", "status")["images"]
        return {
            line["image"]: int(line["bytes_done"])
            for line in lines
            if line["image"] in {f"{POOL}/{image}" for image in case.images}
            and line["finished_at"] is None
            and line["bytes_done"] > 0
        }

    def _await_heals(self, case: Case) -> None:
        self._await("a heal begins", lambda: bool(self._heals(case)))
        self._await(
            "all are being healed, or one no longer",
            lambda: len(self._heals(case)) == len(case.images) or not self._stale(case),
        )

    def _stale(self, case: Case) -> bool:
        return all(self._cluster.info(image)["stale"] for image in case.images)

    def _await(self, what: str, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + HEAL_TIMEOUT_S
        while not holds():
            if time.monotonic() > deadline:
                raise TimeoutError(f"never: {what}: {self._cluster.hci('heal', 'status')}")
            time.sleep(0.05)

    def _uri(self, image: str) -> str:
        return self._cluster.url_at("gateway1", image)

    def _guest_iops(self) -> float:
        found = self._fio(
            GUEST,
            *("--rw=randrw", "--rwmixread=70", "--bs=4k", "--iodepth=32"),
            *(f"--size={GUEST_MIB}m", "--time_based", f"--runtime={self._window_s}"),
        )
        return float(found["read"]["iops"] + found["write"]["iops"])

    def _fill(self, image: str, offset_mib: int, size_mib: int) -> None:
        # Of one seed fio writes the same again, and nothing would differ.
        self._fills += 1
        self._fio(
            image,
            f"--randseed={self._fills}",
            *("--rw=write", "--bs=1m", "--iodepth=8", "--refill_buffers", "--end_fsync=1"),
            *(f"--offset={offset_mib}m", f"--size={size_mib}m"),
        )

    def _fio(self, image: str, *options: str) -> dict[str, Any]:
        done = subprocess.run(
            [
                *("fio", "--name=guest", "--direct=1", "--thread", "--ioengine=nbd"),
                *(f"--uri={self._uri(image)}", "--output-format=json", *options),
            ],
            check=True,
            capture_output=True,
            text=True,
            timeout=self._window_s + HEAL_TIMEOUT_S + FIO_GRACE_S,
        )
        # Engines print notes before the JSON.
        job: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
        if job["error"]:
            raise OSError(job["error"], os.strerror(job["error"]))
        return job


def table(rows: Sequence[Row], least: float) -> str:
    """What was measured, for people."""
    lines = [f"{'':32}{'without':>10}{'beside':>10}{'kept':>7}{'healed':>13}{'goal':>7}"]
    for row in rows:
        verdict = "" if row.ratio >= least else "  missed"
        lines.append(
            f"{row.case.title:32}"
            f"{statistics.median(row.without_iops):10,.0f}{statistics.median(row.beside_iops):10,.0f}"
            f"{row.ratio:7.2f}{statistics.median(row.healed_mib_per_s):7.1f} MiB/s{least:7.2f}"
            f"{verdict}"
        )
    return "\n".join(lines)


def report(rows: Sequence[Row], least: float) -> list[dict[str, Any]]:
    """The same for programs."""
    return [
        {
            "case": row.case.name,
            "without_iops": [round(iops) for iops in row.without_iops],
            "beside_iops": [round(iops) for iops in row.beside_iops],
            "healed_mib_per_s": [round(speed, 1) for speed in row.healed_mib_per_s],
            "kept": round(row.ratio, 3),
            "goal": least,
            "is_met": row.ratio >= least,
        }
        for row in rows
    ]
