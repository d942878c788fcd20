"""The nodes of the simulated cluster: their processes, and what outlives these on their hosts.

A supervisor starts a node again that has ended, but for one that somebody keeps down, and one that
waits for a person. A disk that was put back is judged before its node listens, as in the daemon.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.sim.processes import SimNode
from tests.sim.recovery import Recoverer, new_ledger
from vmstore.ledger import Ledger

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster


class Nodes:
    """See the module. A node is meant by its number."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.processes: list[SimNode | None] = [None] * cluster.shape.nodes
        self.put_back: set[int] = set()
        """Nodes whose disk was put back to an older state."""
        self.refused: set[int] = set()
        """Nodes that may not register, and wait for a person."""
        self._kept_down: set[int] = set()
        self._ledgers: list[Ledger] = []
        self._counters: dict[int, int] = {}
        """The highest start counter of each node so far."""
        self._marks: dict[int, tuple[int, frozenset[str]]] = {}
        """Of nodes that were set back: what was seen of them, and what is distrusted on them."""

    def start(self, node: int) -> None:
        """Start a node's process, if none runs; a supervisor tries again where it cannot."""
        cluster = self._cluster
        self._kept_down.discard(node)
        if self.processes[node] is not None or node in self.refused:
            return
        seen, marked = self._marks.get(node, (0, frozenset()))
        try:
            store_id, counter = cluster.world.start_node(node, seen, sorted(marked))
        except RuntimeError as error:
            cluster.say(f"{cluster.names[node]} cannot start: {error}")
            cluster.safety.records.power_lost(cluster.names[node])
            cluster.judge_memory()
            self._restart_later(node)
            return
        cluster.say(f"{cluster.names[node]} starts, instance {counter}")
        self.processes[node] = process = SimNode(
            cluster.clock,
            cluster.world,
            cluster.state,
            cluster.node_paths[node],
            index=node,
            name=cluster.names[node],
            store_id=store_id,
            start_counter=counter,
            run=f"{node:016x}{next(cluster.numbers):016x}",
            refused=lambda why, for_good: self._refuse(node, why, for_good=for_good),
            set_back=lambda seen: self._set_back(node, seen),
            ledger=self._ledgers[node] if self._ledgers else None,
        )
        if counter <= self._counters.get(node, 0):
            # It is judged before it listens.
            cluster.world.pause_node(node)
            self._serve_when_judged(node, process)
        self._counters[node] = max(counter, self._counters.get(node, 0))

    def _serve_when_judged(self, node: int, process: SimNode) -> None:
        cluster = self._cluster
        if self.processes[node] is process:
            if process.may_serve:
                cluster.world.continue_node(node)
            else:
                cluster.clock.after(0.01, lambda: self._serve_when_judged(node, process))

    def _set_back(self, node: int, seen: int) -> None:
        """Go on as a new instance, on which nothing counts that it holds."""
        cluster = self._cluster
        _, marked = self._marks.get(node, (0, frozenset()))
        self._marks[node] = (seen, marked | self._held(node))
        cluster.say(f"{cluster.names[node]} was set back, the cluster saw start {seen}")

        def again() -> None:
            if self.processes[node] is not None:
                self.stop(node, power=False)
                self.start(node)

        cluster.clock.after(0, again)

    def keep_ledgers(self) -> None:
        """Have nodes keep copies of etcd's records, and somebody recover it; before `build`."""
        cluster = self._cluster
        self._ledgers = [new_ledger() for _ in cluster.names]
        Recoverer(
            cluster.clock,
            cluster.state,
            lambda: [node for node in self.processes if node is not None],
            cluster.say,
            cluster.recovered,
        )

    def _held(self, node: int) -> frozenset[str]:
        return frozenset(each["image"] for each in self._cluster.world.inventory(node)["images"])

    def forget_marks(self) -> None:
        """As a node's daemon does: cross out what a holder has begun to heal."""
        for node, (seen, marked) in self._marks.items():
            if self.processes[node] is not None:
                left = frozenset(self._cluster.world.distrusted(node))
                self._marks[node] = (seen if left else 0, marked & left)

    def stop(self, node: int, *, power: bool) -> None:
        """Kill a node's process, or cut its host's power."""
        process = self.processes[node]
        if process is None:
            return
        self._cluster.world.stop_node(node, power)
        self.ended(node, power=power, why="is killed" if not power else "loses its power")

    def keep_down(self, node: int, *, power: bool) -> None:
        """Stop a node, and do not start it again before somebody does."""
        self._kept_down.add(node)
        self.stop(node, power=power)

    def up(self) -> set[str]:
        """Return the nodes that run."""
        return {
            self._cluster.names[node]
            for node, process in enumerate(self.processes)
            if process is not None
        }

    def ended(self, node: int, *, power: bool, why: str) -> None:
        """Take note that a node's process is gone, by whatever ended it."""
        cluster = self._cluster
        process = self.processes[node]
        if process is not None:
            cluster.clock.end(process.process)
            self.processes[node] = None
        cluster.say(f"{cluster.names[node]} ends: {why}{' (memory lost)' if power else ''}")
        if power:
            cluster.safety.records.power_lost(cluster.names[node])
            cluster.oracle.power_lost(cluster.names[node])
            cluster.judge_memory()
        if cluster.supervised:
            self._restart_later(node)

    def _restart_later(self, node: int) -> None:
        cluster = self._cluster

        def restart() -> None:
            if node not in self._kept_down:
                self.start(node)

        cluster.clock.after(cluster.chance.choice((0.3, 1.0, 3.0, 8.0)), restart)

    def _refuse(self, node: int, why: str, *, for_good: bool) -> None:
        cluster = self._cluster
        cluster.say(f"{cluster.names[node]} may not serve: {why}")
        if for_good:
            self.refused.add(node)
        cluster.clock.after(0, lambda: self.stop(node, power=False))

    def pause(self, node: int) -> None:
        """Stop a node's process as SIGSTOP does."""
        cluster = self._cluster
        process = self.processes[node]
        if process is not None and not process.process.paused:
            process.process.paused = True
            cluster.world.pause_node(node)
            cluster.say(f"{cluster.names[node]} stands still")

    def go_on(self, node: int) -> None:
        """Let it go on."""
        cluster = self._cluster
        process = self.processes[node]
        if process is not None and process.process.paused:
            cluster.world.continue_node(node)
            cluster.clock.go_on(process.process)
            cluster.say(f"{cluster.names[node]} goes on")

    def put_back_disk(self, node: int) -> None:
        """Put the snapshot of a disk in place of what is there; its node is off."""
        cluster = self._cluster
        cluster.world.restore_disk(node)
        # What it had stored, and who relied on that, is not told by its record any more.
        self.put_back.add(node)
        cluster.safety.records.put_back(cluster.names[node])
        cluster.liveness.put_back(cluster.names[node])
        cluster.judge_memory()

    @property
    def keep_etcd(self) -> bool:
        """Whether an etcd that was put back is recovered from them."""
        return bool(self._ledgers)

    def close_ledgers(self) -> None:
        """Close what outlived all processes: it is over."""
        for ledger in self._ledgers:
            ledger.close()
