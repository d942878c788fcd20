"""Speed while a node is away, and while it is healed, beside the speed of a healthy cluster.

What guests keep beside a heal is measured as `make heal` does, by `tests.tools.guest_speed`, of
which the hardest case is taken: the image that is worked on is the one that heals.
"""

from __future__ import annotations

import contextlib
import statistics
from collections import defaultdict
from dataclasses import asdict

from bench import own_cluster
from bench.comparison import median
from bench.fio import Measurement, fill, measure
from bench.goals import Verdict, at_least
from bench.measure import Measure, Setting
from bench.report import Section, Table
from bench.workloads import IMAGE_BYTES, WORKLOADS
from tests.devcluster import DevCluster
from tests.tools import guest_speed
from tests.tools.heal import LEAST_KEPT, RATE_MIB

IMAGE = "bench"
VICTIM = "node3"
HEALED_CASE = "same_image"
HEAL_TIMEOUT_S = 180.0
STATES = ("healthy", "degraded")
WORK = [
    workload
    for workload in WORKLOADS
    if workload.name in {"randwrite 4k depth 32", "randread 4k depth 32", "write 1m depth 8"}
]


class Failures(Measure):
    """What a guest has while a node is away, and while it comes back."""

    name = "failures"
    what = "speed while a node is away and while it is healed, against healthy"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.taken: dict[tuple[str, str], list[Measurement]] = defaultdict(list)
        self.healing: guest_speed.Row | None = None

    def run(self, stack: contextlib.ExitStack) -> None:
        self.directory.mkdir()
        with contextlib.ExitStack() as of_degraded:
            self._degraded(own_cluster.started(of_degraded, self.directory / "degraded"))
        self._healing(own_cluster.started(stack, self.directory / "healing"))

    def _degraded(self, cluster: DevCluster) -> None:
        setting = self.setting
        with setting.status("filling an image"):
            cluster.create(IMAGE, str(IMAGE_BYTES))
            target = own_cluster.target(cluster, IMAGE)
            fill(target)
        for number in range(1, setting.rounds + 1):
            for state in STATES:
                if state == "degraded":
                    cluster.kill(VICTIM)
                    # Opened once without it, the image has it on record as stale.
                    measure(("--rw=randwrite", "--bs=4k"), [target], [], 1)
                for workload in WORK:
                    what = f"round {number} of {setting.rounds}: {workload.name}, {state}"
                    with setting.status(what):
                        pids = own_cluster.pids(cluster)
                        one = measure(workload.fio, [target], pids, setting.window_s)
                    self.taken[workload.name, state].append(one)
                    setting.say(f"{what}: {one.iops:,.0f} IOPS, {one.mb_per_s:,.0f} MB/s")
            cluster.run(VICTIM)
            with setting.status(f"{VICTIM} is healed"):
                cluster.await_health("ok", timeout_s=HEAL_TIMEOUT_S)

    def _healing(self, cluster: DevCluster) -> None:
        setting = self.setting
        cases = [case for case in guest_speed.CASES if case.name == HEALED_CASE]
        speed = guest_speed.GuestSpeed(cluster, setting.window_s, RATE_MIB, setting.say, cases)
        with setting.status("filling what is to be healed"):
            speed.prepare()
        for _ in range(setting.rounds):
            with setting.status("beside a heal, and without"):
                speed.round()
            self.healing = speed.rows[0]

    def section(self) -> Section | None:
        if not self.taken:
            return None
        medians = {key: median(found) for key, found in self.taken.items()}
        tables = [self._away(medians)]
        judged = []
        figures: dict[str, object] = {
            "degraded": [
                {"work": work, "state": state, **asdict(found)}
                for (work, state), found in medians.items()
            ]
        }
        if self.healing is not None:
            verdict = _kept(self.healing)
            judged.append(verdict)
            tables.append(_beside(self.healing, verdict))
            figures["healing"] = guest_speed.report([self.healing], LEAST_KEPT)
        return Section(
            title="While a node is away, and while it is healed",
            about=f"{VICTIM} of three is killed, and started again. Without it there is one copy "
            "less to write, and everything shares one machine's processors and disk: so more may "
            "be left than before. `make heal` measures more kinds of heals.",
            tables=tables,
            verdicts=judged,
            figures=figures,
        )

    def _away(self, medians: dict[tuple[str, str], Measurement]) -> Table:
        lines = []
        for workload in WORK:
            found = [medians.get((workload.name, state)) for state in STATES]
            unit = " MB/s" if workload.unit == "mb_per_s" else ""
            line = [workload.name]
            line += [f"{getattr(one, workload.unit):,.0f}{unit}" if one else "-" for one in found]
            healthy, degraded = found
            line.append(f"{degraded.iops / healthy.iops:.2f}" if healthy and degraded else "-")
            lines.append(line)
        return Table(["workload", "healthy", "a node away", "of healthy"], lines)


def _kept(healing: guest_speed.Row) -> Verdict:
    return at_least("kept beside a heal", healing.ratio, LEAST_KEPT)


def _beside(healing: guest_speed.Row, verdict: Verdict) -> Table:
    without, beside = (
        f"{statistics.median(found):,.0f}" for found in (healing.without_iops, healing.beside_iops)
    )
    healed = statistics.median(healing.healed_mib_per_s)
    line = ["randrw 70/30 4k depth 32", without, beside, f"{healing.ratio:.2f}", verdict.text]
    return Table(
        ["workload", "healthy", "beside a heal", "of healthy", "goal", "healed meanwhile"],
        [[*line, f"{healed:.0f} MiB/s"]],
    )
