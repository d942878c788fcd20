"""An etcd that lost history: what nodes of the simulation keep of its records, and who recovers it.

The product's `HistoryWatch`, `Ledger`, `plan` and `carry_out`; hearing the nodes over gRPC is left
out. A ledger outlives its node's process, as its file does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

from engine._engine import Simulation
from etcd import keys
from etcd.errors import EtcdError
from etcd.interface import Notice
from hci.history import HistoryWatch, Holdings, held_record
from shard.errors import HciError
from shard.ids import ImageId
from tests.sim.arbiters import CLUSTER_ID
from tests.sim.clock import Clock, Process
from tests.sim.cluster_state import Door, Path, State
from vmstore.catalog import Catalog
from vmstore.history import Member
from vmstore.ledger import Ledger
from vmstore.rebuilding import carry_out
from vmstore.recovering import plan
from vmstore.told import Sources

if TYPE_CHECKING:
    from tests.sim.processes import SimNode

LOOK_S = 2.0
"""Between two looks of whoever recovers the cluster."""
AGAIN_S = 0.01


def new_ledger() -> Ledger:
    """Return a ledger without a file."""
    return Ledger(FilePath(":memory:"))


def holdings(world: Simulation, node: int) -> Holdings:
    """Return what a node's store tells of etcd, as `NodeDaemon` does."""
    found = world.inventory(node)
    distrusted = set(found["distrusted"])
    held = {
        ImageId(each["image"]): held_record(ImageId(each["image"]), each)
        for each in found["images"]
        if each["image"] not in distrusted
    }
    return held, frozenset(ImageId(image) for image in found["deleted"])


class SimHistory(HistoryWatch):
    """One node's. A notice that comes in the midst of a check waits for its end, as for a lock."""

    def __init__(
        self,
        name: str,
        etcd: Door,
        ledger: Ledger,
        clock: Clock,
        process: Process,
        holds: Callable[[], Holdings],
        deleted: Callable[[Iterable[ImageId]], None],
    ) -> None:
        super().__init__(
            name, etcd, Catalog(etcd), ledger, holds, deleted, clock_s=lambda: clock.now_s
        )
        self._lock: Any = nullcontext()  # type: ignore[assignment]
        self._clock = clock
        self._process = process
        self._checking = False

    def check(self) -> bool:
        """See `HistoryWatch`."""
        self._checking = True
        try:
            return super().check()
        finally:
            self._checking = False

    def _on_notice(self, notice: Notice) -> None:
        if self._checking:
            self._clock.after(AGAIN_S, lambda: self._on_notice(notice), self._process)
        else:
            super()._on_notice(notice)


class Recoverer:
    """The person who runs `hci cluster recover` where `hci status` says that etcd lost history."""

    def __init__(
        self,
        clock: Clock,
        state: State,
        nodes: Callable[[], Iterable[SimNode]],
        say: Callable[[str], None],
        recovered: Callable[[], None],
    ) -> None:
        self._clock = clock
        self._nodes = nodes
        self._say = say
        self._recovered = recovered
        self._runs = 0
        self._process = Process("operator")
        self._etcd = Door(state, Path(), self._process)
        clock.start(self._process, self._look_after)

    def _look_after(self) -> None:
        while True:
            self._clock.sleep(LOOK_S, self._process)
            try:
                if self._etcd.get(keys.LOST) is not None:
                    self._recover()
            except (HciError, EtcdError) as error:
                self._say(f"  recovery: {error}")

    def _recover(self) -> None:
        now = {item.key: item for item in self._etcd.get_prefix(keys.PREFIX).items}
        members: Mapping[str, Member] = {node.name: node.member() for node in self._nodes()}
        sources = Sources(CLUSTER_ID, members, {}, {}, now)
        self._runs += 1
        planned = plan(sources, f"{self._runs:032x}")
        if planned.missing:
            self._say(f"  recovery: {planned.missing[0].missing}")
            return
        carry_out(self._etcd, sources, planned)
        self._recovered()
        heard = ", ".join(sorted(members))
        self._say(f"etcd is recovered from {heard}")
