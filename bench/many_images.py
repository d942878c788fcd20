"""Eight images at once beside one: what they are given in sum.

One image of 512 MiB, and eight that have as much together. Eight clients are measured twice: with
as many requests in flight as the one has, shared out among them, and with as many each.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from dataclasses import asdict, dataclass

from bench import own_cluster
from bench.comparison import median
from bench.fio import Measurement, fill, measure
from bench.goals import Verdict, at_least
from bench.measure import Measure, Setting
from bench.report import Section, Table
from bench.workloads import IMAGE_BYTES

IMAGES = 8
LEAST = 1.0
"""What eight get in sum, of what one gets."""


@dataclass(frozen=True)
class Case:
    """How many clients, of as many images, and what each has in flight."""

    name: str
    images: int
    depth: int


ONE = Case("one, depth 32", 1, 32)
SHARED = Case("eight, depth 4 each", IMAGES, 4)
EACH = Case("eight, depth 32 each", IMAGES, 32)
CASES = (ONE, SHARED, EACH)
WORK = {"4k random write": "randwrite", "4k random read": "randread"}


class ManyImages(Measure):
    """The sum of eight images' speed."""

    name = "images"
    what = "eight images at once, in sum, against one"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.taken: dict[tuple[str, Case], list[Measurement]] = defaultdict(list)

    def run(self, stack: contextlib.ExitStack) -> None:
        setting = self.setting
        with setting.status("starting a cluster and filling nine images"):
            cluster = own_cluster.started(stack, self.directory)
            targets: dict[int, list[list[str]]] = defaultdict(list)
            for count in (ONE.images, IMAGES):
                for number in range(count):
                    image = f"of{count}-{number}"
                    cluster.create(image, str(IMAGE_BYTES // count))
                    targets[count].append(own_cluster.target(cluster, image))
                    fill(targets[count][-1], IMAGE_BYTES // count)
        for number in range(1, setting.rounds + 1):
            for work, mode in WORK.items():
                for case in CASES:
                    what = f"round {number} of {setting.rounds}: {work}, {case.name}"
                    with setting.status(what):
                        one = measure(
                            (f"--rw={mode}", "--bs=4k", f"--iodepth={case.depth}"),
                            targets[case.images],
                            own_cluster.pids(cluster),
                            setting.window_s,
                            IMAGE_BYTES // case.images,
                        )
                    self.taken[work, case].append(one)
                    setting.say(f"{what}: {one.iops:,.0f} IOPS, p99 {one.p99_us:,.0f} µs")

    def section(self) -> Section | None:
        if not self.taken:
            return None
        medians = {key: median(found) for key, found in self.taken.items()}
        judged, lines = [], []
        for work in WORK:
            line = [work]
            for case in CASES:
                found = medians.get((work, case))
                line.append(f"{found.iops:,.0f}" if found else "-")
            for case in (SHARED, EACH):
                verdict = _verdict(work, case, medians)
                judged.append(verdict)
                line.append("-" if verdict.figure is None else f"{verdict.figure:.2f}")
                line.append(verdict.text)
            lines.append(line)
        header = ["IOPS in sum", *(case.name for case in CASES)]
        header += ["depth 4 ÷ one", "goal", "depth 32 ÷ one", "goal"]
        return Section(
            title="Eight images at once",
            about=f"Each image has its own client. {IMAGE_BYTES >> 20} MiB are worked on in sum.",
            tables=[Table(header, lines)],
            verdicts=judged,
            figures={
                "images": [
                    {"work": work, "case": case.name, **asdict(found)}
                    for (work, case), found in medians.items()
                ]
            },
        )


def _verdict(work: str, case: Case, medians: dict[tuple[str, Case], Measurement]) -> Verdict:
    one, many = medians.get((work, ONE)), medians.get((work, case))
    return at_least(f"{work}, {case.name}", many.iops / one.iops if one and many else None, LEAST)
