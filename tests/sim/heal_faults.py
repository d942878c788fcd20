"""What befalls a node that is healed or admitted, and those whom it is healed from."""

from __future__ import annotations

from collections.abc import Callable

from tests.sim.faults import Faults


class HealFaults(Faults):
    """Each waits for the next heal to begin or end, or the next admission, and strikes then."""

    def interrupt_heal(self) -> None:
        """The next heal is interrupted at some point."""
        self.leave_behind()
        self._strikes.append(self._strike)

    def _strike(self, healed: str) -> None:
        """Hit the node that is healed, one that may be its source, the holder, or etcd."""
        if self._over:
            return
        cluster = self.cluster
        target = cluster.names.index(healed)
        others = [node for node in range(cluster.shape.nodes) if node != target]
        source = self.chance.choice(others)
        holders = [
            gateway
            for gateway, process in enumerate(cluster.gateways)
            if process is not None and process.exports.snapshot()
        ]
        holder = self.chance.choice(holders) if holders else 0
        strikes: list[Callable[[], None]] = [
            lambda: cluster.nodes.stop(target, power=False),
            lambda: cluster.nodes.stop(target, power=True),
            lambda: cluster.nodes.stop(source, power=False),
            lambda: cluster.nodes.stop(source, power=True),
            lambda: cluster.world.crash_after(target, self.chance.randrange(1, 30), True),
            lambda: cluster.world.crash_after(source, self.chance.randrange(1, 30), False),
            lambda: cluster.world.reset(holder, target),
            lambda: cluster.world.reset(holder, source),
            lambda: self._cut_path(holder, target, "both", 6.0),
            lambda: self._cut_peers(target, source, self.chance.choice(("both", "back")), 3.0),
            lambda: cluster.world.reset_peers(target, source),
            lambda: cluster.stop_gateway(holder, host=self.chance.random() < 0.3),
            lambda: self._stand_still(holder),
            self.etcd_down,
            self.slow_etcd,
            lambda: self._cut_etcd_of(cluster.gateway_paths[holder], f"gate-{holder}", 8.0),
            self.second,
            self._guest_comes,
        ]
        strike = self.chance.choice(strikes)
        cluster.say(f"the heal of {healed} is interrupted")
        strike()
        if self.chance.random() < 0.4:
            self.chance.choice(strikes)()

    def interrupt_end_of_heal(self) -> None:
        """The next heal is interrupted when all is level, and the record takes the node in."""
        self.leave_behind()
        self._at_event.setdefault("healed", []).append(self._strike_at_end)

    def _strike_at_end(self, gateway: int, healed: str) -> None:
        cluster = self.cluster
        target = cluster.names.index(healed)
        path = cluster.gateway_paths[gateway]
        power = self.chance.random() < 0.5

        def lose_answer() -> None:
            """etcd takes the node in, and the holder does not hear of it."""
            cluster.say(f"gate-{gateway} does not hear from etcd")
            path.back = False
            self._soon(lambda: cluster.nodes.stop(target, power=power), 0.05)
            cluster.clock.after(self.chance.choice((1.0, 5.0)), open_path)

        def open_path() -> None:
            path.back = True

        def cut_sources() -> None:
            for node in range(cluster.shape.nodes):
                if node != target:
                    cluster.nodes.stop(node, power=True)

        strikes: list[Callable[[], None]] = [
            lose_answer,
            cut_sources,
            lambda: self._soon(lambda: cluster.nodes.stop(target, power=True), 0.2),
            lambda: self._soon(lambda: cluster.world.reset(gateway, target), 0.03),
            lambda: self._soon(lambda: cluster.stop_gateway(gateway, host=False), 0.03),
        ]
        cluster.say(f"the end of the heal of {healed} is interrupted")
        self.chance.choice(strikes)()

    def interrupt_admission(self) -> None:
        """A node restarts; when it is level it loses its power, or its sources do."""
        node = self._node()
        self.cluster.nodes.stop(node, power=self.chance.random() < 0.7)
        self._at_event.setdefault("admitted", []).append(self._strike_admitted)

    def _strike_admitted(self, gateway: int, _node: str) -> None:
        cluster = self.cluster
        nodes = range(cluster.shape.nodes)
        struck = self.chance.sample(nodes, self.chance.choice((1, 1, 2, len(nodes) - 1)))
        cluster.say("an admission is struck")
        for node in struck:
            self._soon(lambda node=node: cluster.nodes.stop(node, power=True), 0.1)
        if self.chance.random() < 0.3:
            self._soon(lambda: cluster.stop_gateway(gateway, host=False), 0.1)

    def slow_listing(self) -> None:
        """The next heal hears late from one of its sources what was written."""
        self.leave_behind()
        self._strikes.append(self._slow_source)

    def _slow_source(self, healed: str) -> None:
        cluster, node = self.cluster, self._node()
        if cluster.names[node] == healed:
            return
        for gateway in range(cluster.shape.gateways):
            cluster.set_latency(gateway, node, 300_000_000, 600_000_000)

        def undo() -> None:
            for gateway in range(cluster.shape.gateways):
                cluster.set_latency(gateway, node, 50_000, 1_000_000)

        cluster.clock.after(1.0, undo)

    def lose_sources(self) -> None:
        """All who could be sources of the next heal lose their power while it goes on."""
        self.leave_behind()
        self._strikes.append(self._cut_sources)

    def _cut_sources(self, healed: str) -> None:
        cluster = self.cluster
        target = cluster.names.index(healed)
        cluster.world.set_disk_speed(target, 200_000_000, 500_000_000)
        self._for_a_while(
            lambda: cluster.world.set_disk_speed(target, 100_000, 4_000_000), 1.0, 3.0
        )

        def cut() -> None:
            for node in range(cluster.shape.nodes):
                if node != target:
                    cluster.nodes.stop(node, power=True)
                    cluster.nodes.start(node)

        self._soon(cut, 0.4)
