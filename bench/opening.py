"""What it costs to have images open: the time of an open, and the daemons' resident memory.

Time is from connecting to the answer that lets a client begin (NBD_OPT_GO's acknowledgement), and
to that of its first read. Nobody has the image open before: each open is that of a guest which is
started. Every case has daemons that were just started, since memory that was used once stays.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from bench import own_cluster
from bench.fio import MeasurementError, measure_amount
from bench.measure import Measure, Setting
from bench.processes import resident_bytes
from bench.report import Section, Table
from tests.devcluster import DevCluster
from tests.protocol.raw_client import Client

MIB = 1 << 20
COUNTS = (1, 10, 100)
SIZES = ("1G", "1T", "10T")
SMALL = "1G"
WRITES = 4096
"""At random places: in images of 1 TiB and more nearly each is in a shard of its own."""
OPENS = 3
"""Of each case, in each round."""
ACKNOWLEDGED = 1
WRITE_TIMEOUT_S = 120


@dataclass
class Case:
    """What was open, how long an open took each time, and what memory the daemons had then."""

    what: str
    ready_ms: list[float] = field(default_factory=list)
    read_ms: list[float] = field(default_factory=list)
    gateway_mib: float | None = None
    node_mib: float | None = None
    """Of the node that has most."""


class Opening(Measure):
    """Time and memory as images become more and larger."""

    name = "open"
    what = "time of an image's open, and memory, of 1 to 100 images and 1 GiB to 10 TiB"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.cases: list[Case] = []

    def run(self, stack: contextlib.ExitStack) -> None:
        with self.setting.status(f"making {max(COUNTS)} images"):
            cluster = own_cluster.started(stack, self.directory)
            for number in range(max(COUNTS)):
                cluster.create(f"many{number}", SMALL)
            for size in SIZES:
                cluster.create(f"of{size}", size)
        _start_again(cluster)
        self._note(Case("none"), cluster)
        for count in COUNTS:
            _start_again(cluster)
            self._of_many(cluster, count)
        for size in SIZES:
            _start_again(cluster)
            self._of_size(cluster, size)

    def _of_many(self, cluster: DevCluster, count: int) -> None:
        with contextlib.ExitStack() as others:
            for number in range(count - 1):
                uri = cluster.url_at(own_cluster.GATEWAY, f"many{number}")
                others.enter_context(_opened(uri))
            self._take(Case(f"{count} of {SMALL}, empty"), cluster, f"many{count - 1}")

    def _of_size(self, cluster: DevCluster, size: str) -> None:
        image = f"of{size}"
        if size != SMALL:
            self._take(Case(f"1 of {size}, empty"), cluster, image)
        measure_amount(
            (
                *("--rw=randwrite", "--bs=4k", "--iodepth=32", f"--io_size={WRITES * 4096}"),
                # fio's map of a large image's blocks would take longer than the writes.
                *(f"--size={size}", "--norandommap", "--random_generator=tausworthe64"),
            ),
            own_cluster.target(cluster, image),
            [],
            WRITE_TIMEOUT_S,
        )
        own_cluster.await_closed(cluster, image)
        self._take(Case(f"1 of {size}, {WRITES:,} blocks written"), cluster, image)

    def _take(self, case: Case, cluster: DevCluster, image: str) -> None:
        """Opens an image again and again; it is open once more as memory is looked at."""
        uri = cluster.url_at(own_cluster.GATEWAY, image)
        with self.setting.status(case.what):
            for _ in range(OPENS * self.setting.rounds):
                began_s = time.perf_counter()
                with _opened(uri) as client:
                    case.ready_ms.append((time.perf_counter() - began_s) * 1e3)
                    client.read(0, 4096)
                    case.read_ms.append((time.perf_counter() - began_s) * 1e3)
                own_cluster.await_closed(cluster, image)
            with _opened(uri) as client:
                client.read(0, 4096)
                self._note(case, cluster)
            own_cluster.await_closed(cluster, image)

    def _note(self, case: Case, cluster: DevCluster) -> None:
        resident = {
            name: resident_bytes(member["pid"]) / MIB for name, member in cluster.members().items()
        }
        case.gateway_mib = resident[own_cluster.GATEWAY]
        case.node_mib = max(resident[name] for name in cluster.nodes)
        self.cases.append(case)
        ready = f"{statistics.median(case.ready_ms):.1f} ms to open, " if case.ready_ms else ""
        self.setting.say(
            f"{case.what}: {ready}gateway {case.gateway_mib:.0f} MiB, node {case.node_mib:.0f} MiB"
        )

    def section(self) -> Section | None:
        if not self.cases:
            return None
        lines = [
            [
                case.what,
                *(_median_and_worst(taken) for taken in (case.ready_ms, case.read_ms)),
                *(f"{mib:,.0f}" for mib in (case.gateway_mib, case.node_mib) if mib is not None),
            ]
            for case in self.cases
        ]
        header = ["images open", "open, ms (worst)", "first read, ms (worst)"]
        header += ["gateway, MiB", "a node, MiB"]
        return Section(
            title="An image's open, and memory",
            about="Opens of the last of so many images, from the client's connect to the gateway's "
            "acknowledgement and to the answer of a first read of 4 KiB; resident memory of the "
            "gateway and of the node that has most, with all of them open. Daemons are started "
            "anew for each number and size.",
            tables=[Table(header, lines)],
            figures={"open": [asdict(case) for case in self.cases]},
        )


def _opened(uri: str) -> Client:
    """A client that may begin; raises MeasurementError where the gateway refuses."""
    client = Client(uri)
    try:
        client.greet()
        kind, _ = client.go()
    except BaseException:
        client.socket.close()
        raise
    if kind != ACKNOWLEDGED:
        client.socket.close()
        raise MeasurementError(f"the gateway refuses {uri}")
    return client


def _start_again(cluster: DevCluster) -> None:
    cluster.hci("dev", "stop")
    cluster.start()


def _median_and_worst(taken: Sequence[float]) -> str:
    return f"{statistics.median(taken):,.1f} ({max(taken):,.1f})" if taken else "-"
