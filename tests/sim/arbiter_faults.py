"""What befalls the arbiter, alone or with the nodes and etcd."""

from __future__ import annotations

from collections.abc import Callable

from tests.sim.faults import Faults


class ArbiterFaults(Faults):
    """See the module. There is an arbiter in every kind of history that has these."""

    def kill_arbiter(self) -> None:
        """Its process ends."""
        self.cluster.site.stop(power=False)

    def cut_arbiter(self) -> None:
        """Its host loses power."""
        self.cluster.site.stop(power=True)

    def crash_arbiter(self) -> None:
        """It ends in the midst of what it writes."""
        self.cluster.site.crash_soon()

    def pause_arbiter(self) -> None:
        """It stands still."""
        site = self.cluster.site
        site.pause()
        self._for_a_while(site.go_on, 0.5, 3.0, 7.0)

    def cut_to_arbiter(self) -> None:
        """A gateway does not reach it, or is not reached by it."""
        name = f"gate-{self._gateway()}"
        way = self.cluster.site.ways[name]
        way.there, way.back = self.chance.choice(((False, False), (False, True), (True, False)))
        self.cluster.say(f"{name} is cut off from the arbiter ({way.there}, {way.back})")

        def undo() -> None:
            way.there = way.back = True

        self._for_a_while(undo, 1.0, 5.0, 12.0)

    def slow_arbiter(self) -> None:
        """The way to it is slow, and loses what takes too long."""
        way = self.cluster.site.ways[f"gate-{self._gateway()}"]
        way.slow = True

        def undo() -> None:
            way.slow = False

        self._for_a_while(undo, 3.0, 10.0)

    def cut_arbiter_from_etcd(self) -> None:
        """It votes on, and is not registered."""
        self._cut_etcd_of(self.cluster.site.path, self.cluster.site.current, 12.0)

    def empty_arbiter(self) -> None:
        """Its disk is lost."""
        self.cluster.site.empty()

    def snapshot_arbiter(self) -> None:
        """Somebody takes a snapshot of its disk."""
        self.cluster.site.snapshot()

    def roll_back_arbiter(self) -> None:
        """… and puts it back."""
        self.cluster.site.roll_back()

    def replace_arbiter(self) -> None:
        """A person replaces it, though nothing is wrong with it."""
        self.cluster.site.replace(self.cluster.nodes.up)

    def lose_in_order(self) -> None:
        """Nodes, arbiter and etcd go one after the other, and come back in another order."""
        cluster, site = self.cluster, self.cluster.site
        pair = self.chance.sample(range(cluster.shape.nodes), 2)

        def down_etcd() -> None:
            cluster.state.up = False
            cluster.say("etcd is down")

        def up_etcd() -> None:
            cluster.state.up = True
            cluster.say("etcd is up")

        def lose(node: int) -> Callable[[], None]:
            return lambda: cluster.nodes.keep_down(node, power=self.chance.random() < 0.3)

        def regain(node: int) -> Callable[[], None]:
            return lambda: cluster.nodes.start(node)

        parts: list[tuple[Callable[[], None], Callable[[], None]]] = [
            (lose(pair[0]), regain(pair[0])),
            (lose(pair[1]), regain(pair[1])),
            (lambda: site.keep_down(power=self.chance.random() < 0.3), site.start),
            (down_etcd, up_etcd),
        ]
        chosen = self.chance.sample(parts, self.chance.choice((2, 3, 3, 4)))
        at_s = 0.0
        for lose_it, _ in chosen:
            cluster.clock.after(at_s, lambda lose_it=lose_it: self._over or lose_it())
            at_s += self.chance.choice((0.0, 0.05, 1.0, 3.0, 6.0))
        at_s += self.chance.choice((0.5, 3.0))
        for _, regain_it in self.chance.sample(chosen, len(chosen)):
            cluster.clock.after(at_s, regain_it)
            at_s += self.chance.choice((0.0, 1.0, 4.0))
