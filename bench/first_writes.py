"""First writes beside overwrites: what it costs that an image is new.

The same writes are made twice to a new image: first to shards that no node has yet, then over what
was just written. They go to the nodes' logs, and shard files are made as those are emptied, which
a burst is over before. So all is done on two clusters: as it is, and with the smallest logs, where
what is written has to be in shard files for the writes to go on.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import statistics
from collections import defaultdict
from dataclasses import asdict, dataclass

from bench import own_cluster
from bench.fio import Measurement, MeasurementError, measure_amount
from bench.goals import Verdict, at_most
from bench.measure import Measure, Setting
from bench.report import Section, Table
from tests.devcluster import DevCluster

MIB = 1 << 20
SHARD_BYTES = 4 * MIB
SHARDS = 8192
MOST = 2.0
"""What a first write costs, in overwrites."""
TIMEOUT_S = 120
SMALL_LOG = "16M"
IMAGE = "new"


@dataclass(frozen=True)
class Case:
    """A new image's size, and what is written to it."""

    name: str
    size_bytes: int
    fio: tuple[str, ...]
    unit: str


CASES = (
    Case(
        "4k, each to a shard of its own, depth 32",
        SHARDS * SHARD_BYTES,
        (
            f"--rw=write:{SHARD_BYTES - 4096}",
            "--bs=4k",
            "--iodepth=32",
            f"--io_size={SHARDS * 4096}",
        ),
        "iops",
    ),
    Case(
        # fio's random numbers are the same in each run, so the second one writes the same blocks.
        "4k random, depth 32",
        512 * MIB,
        ("--rw=randwrite", "--bs=4k", "--iodepth=32", f"--io_size={128 * MIB}"),
        "iops",
    ),
    Case(
        "1m in sequence, depth 8", 512 * MIB, ("--rw=write", "--bs=1m", "--iodepth=8"), "mb_per_s"
    ),
)
LOGS = ("as it is", SMALL_LOG)


@dataclass(frozen=True)
class Pair:
    """The same writes, to a new image and over themselves."""

    first: Measurement
    over: Measurement

    @property
    def cost(self) -> float:
        """Of a first write, in overwrites."""
        return self.over.iops / self.first.iops


class FirstWrites(Measure):
    """What the first write to a shard costs."""

    name = "first-writes"
    what = "writes to a new image against overwrites"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.taken: dict[tuple[Case, str], list[Pair]] = defaultdict(list)

    def run(self, stack: contextlib.ExitStack) -> None:
        setting = self.setting
        self.directory.mkdir()
        clusters = {}
        with setting.status("starting two clusters"):
            for number, log in enumerate(LOGS):
                cluster = own_cluster.started(stack, self.directory / str(number))
                if log == SMALL_LOG:
                    _set_log(cluster, log)
                clusters[log] = cluster
        for number in range(1, setting.rounds + 1):
            for case in CASES:
                for log, cluster in clusters.items():
                    self._take(f"round {number} of {setting.rounds}", case, log, cluster)

    def _take(self, when: str, case: Case, log: str, cluster: DevCluster) -> None:
        what = f"{when}: {case.name}, log {log}"
        cluster.create(IMAGE, str(case.size_bytes))
        target = own_cluster.target(cluster, IMAGE)
        options = (*case.fio, f"--size={case.size_bytes}")
        try:
            with self.setting.status(what):
                first, over = (
                    measure_amount(options, target, own_cluster.pids(cluster), TIMEOUT_S)
                    for _ in range(2)
                )
        except MeasurementError as failure:
            self.setting.failures.append(f"{what}: {failure}")
        else:
            pair = Pair(first, over)
            self.taken[case, log].append(pair)
            self.setting.say(
                f"{what}: {first.iops:,.0f} first writes, {over.iops:,.0f} overwrites a second: "
                f"a first write costs {pair.cost:.2f} overwrites"
            )
        own_cluster.remove(cluster, IMAGE)

    def section(self) -> Section | None:
        if not self.taken:
            return None
        judged, lines, figures = [], [], []
        for (case, log), pairs in self.taken.items():
            verdict = verdict_of(f"first writes, {case.name}, log {log}", pairs)
            judged.append(verdict)
            unit = " MB/s" if case.unit == "mb_per_s" else ""
            speeds = [
                statistics.median(getattr(one, case.unit) for one in side)
                for side in ([pair.first for pair in pairs], [pair.over for pair in pairs])
            ]
            lines.append(
                [
                    f"{case.name}",
                    log,
                    *(f"{speed:,.0f}{unit}" for speed in speeds),
                    f"{verdict.figure:.2f}",
                    verdict.text,
                ]
            )
            figures.append(
                {
                    "case": case.name,
                    "log": log,
                    "cost": verdict.figure,
                    "rounds": [asdict(pair) for pair in pairs],
                }
            )
        header = ["writes", "log", "first", "over", "cost of a first one", "goal"]
        return Section(
            title="First writes",
            about="The same writes twice to a new image, each time to the end of a flush. Cost is "
            f"the time of a first write over that of an overwrite. Logs of {SMALL_LOG} are full "
            "all the time, so that shard files are made while the writes go on.",
            tables=[Table(header, lines)],
            verdicts=judged,
            figures={"first_writes": figures},
        )


def verdict_of(what: str, pairs: list[Pair]) -> Verdict:
    """The median of the rounds, beside the goal."""
    return at_most(what, statistics.median(pair.cost for pair in pairs), MOST)


def _set_log(cluster: DevCluster, size: str) -> None:
    """Begins the cluster anew with logs of `size`, as segments keep the size of their beginning."""
    members = cluster.members().values()
    folders = [member["data_dir"] for member in members if member["kind"] in {"etcd", "node"}]
    cluster.hci("dev", "stop")
    for folder in folders:
        shutil.rmtree(folder)
    with_log = rf'\1\nlog_bytes = "{size}"'
    text = cluster.config.read_text()
    cluster.config.write_text(re.sub(r"^(\[node\..*\])$", with_log, text, flags=re.MULTILINE))
    cluster.start()
