"""Inside a guest: the same guest on an image of this project, and on one plain file.

The guest runs fio on its virtio-blk disk, which QEMU opens over NBD without a cache of the host
(`cache=none`). Its peer's disk is a raw file that qemu-nbd serves: one copy, in the page cache.
Both guests run at once and take turns; the one that waits does nothing. Their processor is emulated
(TCG), so that this can be measured anywhere: that takes time of each request on both sides.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

from bench import own_cluster
from bench.comparison import median
from bench.fio import Measurement, MeasurementError, fill
from bench.guest_system import MeasuringGuest, build
from bench.measure import Measure, Setting, SkippedError
from bench.processes import end_processes_naming
from bench.report import Section, Table
from bench.workloads import IMAGE_BYTES, WORKLOADS
from tests.waiting import is_listened_at

IMAGE = "bench"
PEER = "qemu-nbd"
SYSTEMS = ("hci", PEER)
START_TIMEOUT_S = 30.0


class InGuest(Measure):
    """What a guest's own programs have of its disk."""

    name = "guest"
    what = "inside a guest, against the same guest on qemu-nbd with a raw file"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.taken: dict[tuple[str, str], list[Measurement]] = defaultdict(list)

    def run(self, stack: contextlib.ExitStack) -> None:
        setting = self.setting
        for program in ("qemu-system-x86_64", "qemu-nbd", "cpio"):
            if shutil.which(program) is None:
                raise SkippedError(f"{program} is not installed")
        self.directory.mkdir()
        with setting.status("building the guest"):
            system = build(self.directory)
        with setting.status("filling the disks"):
            cluster = own_cluster.started(stack, self.directory / "hci")
            cluster.create(IMAGE, str(IMAGE_BYTES))
            uris = {"hci": cluster.url_at(own_cluster.GATEWAY, IMAGE), PEER: self._peer(stack)}
            for uri in uris.values():
                fill(["--ioengine=nbd", f"--uri={uri}"])
        with setting.status("booting both guests"):
            guests = {
                name: stack.enter_context(
                    MeasuringGuest(system, uris[name], self.directory / f"guest-{name}")
                )
                for name in SYSTEMS
            }
        for number in range(1, setting.rounds + 1):
            for workload in WORKLOADS:
                for name, guest in guests.items():
                    what = f"round {number} of {setting.rounds}: {workload.name} in a guest, {name}"
                    # What the other one left in the page cache is not this one's to write back.
                    os.sync()
                    with setting.status(what):
                        one = guest.measure(workload.fio, setting.window_s, IMAGE_BYTES)
                    self.taken[workload.name, name].append(one)
                    setting.say(f"{what}: {one.iops:,.0f} IOPS, {one.mb_per_s:,.0f} MB/s")
        for guest in guests.values():
            if errors := guest.io_errors():
                raise MeasurementError(f"QEMU reported an I/O error: {errors[0]}")

    def _peer(self, stack: contextlib.ExitStack) -> str:
        """Starts qemu-nbd; returns its URI."""
        directory = self.directory / PEER
        directory.mkdir()
        image, socket = directory / "image", directory / "nbd.sock"
        with image.open("wb") as file:
            file.truncate(IMAGE_BYTES)
        stack.callback(end_processes_naming, directory)
        process = subprocess.Popen(
            [
                *("qemu-nbd", "--persistent", "--shared=8", "--format=raw", "--discard=unmap"),
                *(f"--socket={socket}", str(image)),
            ],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        _await_socket(process, socket)
        return f"nbd+unix:///?socket={socket}"

    def section(self) -> Section | None:
        if not self.taken:
            return None
        medians = {key: median(found) for key, found in self.taken.items()}
        lines = []
        for workload in WORKLOADS:
            ours, theirs = (medians.get((workload.name, name)) for name in SYSTEMS)
            unit = " MB/s" if workload.unit == "mb_per_s" else ""
            line = [workload.name]
            line += [
                f"{getattr(one, workload.unit):,.0f}{unit}" if one else "-"
                for one in (ours, theirs)
            ]
            line.append(f"{ours.iops / theirs.iops:.2f}" if ours and theirs else "-")
            line += [f"{one.p99_us:,.0f}" if one else "-" for one in (ours, theirs)]
            lines.append(line)
        header = ["in a guest", *SYSTEMS, f"÷ {PEER}", *(f"p99 {name}, µs" for name in SYSTEMS)]
        return Section(
            title="Inside a guest",
            about="The same guest on virtio-blk with cache=none, emulated (TCG), one virtual "
            f"processor: on an image with three copies, and on {PEER} with a raw file.",
            tables=[Table(header, lines)],
            figures={
                "guest": [
                    {"work": work, "system": name, **asdict(found)}
                    for (work, name), found in medians.items()
                ]
            },
        )


def _await_socket(process: subprocess.Popen[bytes], socket: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not is_listened_at(socket):
        if process.poll() is not None or time.monotonic() > deadline:
            raise SkippedError(f"{PEER} does not start")
        time.sleep(0.05)
