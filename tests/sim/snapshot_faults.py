"""Snapshots and rollbacks as steps of a history, and what befalls the cluster in the midst."""

from __future__ import annotations

from functools import partial

from tests.sim.cluster import Cluster
from tests.sim.guest import Life
from tests.sim.strikes import Strikes

CLONES_MAX = 6
"""Of one image in a history: each is read in the end, at all gateways."""


class SnapshotFaults(Strikes):
    """See the module."""

    def take_snapshot(self) -> None:
        """Somebody wants one, at the gateway that has the image, as the command line does."""
        self.cluster.snapshots.take(self._asked())

    def _asked(self) -> int:
        guests = self.cluster.guests
        holders = [index for index, guest in enumerate(guests) if guest.life is Life.RUNNING]
        return self.chance.choice(holders) if holders else self._gateway()

    def read_snapshot(self) -> None:
        """Somebody reads one that etcd names, at any gateway."""
        cluster = self.cluster
        if cluster.record is None or cluster.snapshots.readers > 3:
            return
        names = [each.name for each in cluster.record.snapshots]
        if names:
            cluster.snapshots.read(self.chance.choice(names), self._gateway())

    def strike_snapshot(self) -> None:
        """One is taken, and as it is frozen, or soon after, something befalls the cluster."""
        cluster = self.cluster
        strikes = (
            lambda gateway: cluster.stop_gateway(gateway, host=False),
            lambda gateway: cluster.stop_gateway(gateway, host=True),
            lambda _gateway: self.kill_node(),
            lambda _gateway: self.cut_node(),
            lambda _gateway: self.cut_all(),
            lambda _gateway: self.etcd_down(),
            self._cut_etcd_then_kill,
            self._cut_etcd_then_kill,
            self._cut_etcd_then_kill,
            self._store_in_one_set,
            self._store_in_one_set,
        )
        strike = self.chance.choice(strikes)
        pause_s = self.chance.choice((0.0, 0.001, 0.004, 0.02, 0.1)) * self.chance.random()

        def frozen(gateway: int, _node: str) -> None:
            cluster.clock.after(pause_s, lambda: self._over or strike(gateway))

        self._at_event.setdefault("frozen", []).append(frozen)
        cluster.snapshots.take(self._asked())

    def roll_back_image(self) -> None:
        """Whoever has the image leaves, for a while, and somebody has it rolled back."""
        self.guests_leave()
        for _ in range(self.chance.choice((1, 1, 2))):
            self._later(self.chance.uniform(0.0, 1.5), self._roll_back)

    def _roll_back(self) -> None:
        cluster = self.cluster
        names = [each.name for each in cluster.record.snapshots] if cluster.record else []
        if names:
            force = self.chance.random() < 0.8
            cluster.rollbacks.ask(self.chance.choice(names), self._gateway(), force=force)

    def strike_rollback(self) -> None:
        """The next one is struck: as it freezes, as etcd is asked, or as nodes store it."""
        cluster = self.cluster
        strikes = (
            lambda gateway: cluster.stop_gateway(gateway, host=False),
            lambda gateway: cluster.stop_gateway(gateway, host=False),
            lambda gateway: cluster.stop_gateway(gateway, host=True),
            lambda _gateway: self.kill_node(),
            lambda _gateway: self.cut_node(),
            lambda _gateway: self.cut_all(),
            lambda _gateway: self.crash_node(),
            lambda _gateway: self.etcd_down(),
            self._cut_etcd_then_kill,
            self._store_in_one_set,
        )
        strike = self.chance.choice(strikes)
        pause_s = self.chance.choice((0.0, 0.001, 0.004, 0.02, 0.1)) * self.chance.random()

        def struck(gateway: int, _node: str) -> None:
            cluster.clock.after(pause_s, lambda: self._over or strike(gateway))

        self._at_event.setdefault("frozen", []).append(struck)
        self.roll_back_image()

    def roll_back_elsewhere(self) -> None:
        """The holder stands still until its lease is over, with its guest; another one goes back.

        What the guest hears afterwards it must not take for what the image holds.
        """
        cluster = self.cluster
        gateway = self._asked()
        others = [index for index in range(cluster.shape.gateways) if index != gateway]
        names = [each.name for each in cluster.record.snapshots] if cluster.record else []
        if not names or not others:
            return
        cluster.pause_gateway(gateway)
        name, other = self.chance.choice(names), self.chance.choice(others)
        self._away_until_s = cluster.clock.now_s + 14.0
        self._later(11.5, lambda: _ask(cluster, name, other))
        self._later(self.chance.uniform(12.0, 16.0), lambda: cluster.continue_gateway(gateway))

    def remove_snapshot(self) -> None:
        """Somebody removes one, whoever has the image."""
        cluster = self.cluster
        names = [each.name for each in cluster.record.snapshots] if cluster.record else []
        if names:
            cluster.removals.ask(self.chance.choice(names), self._asked())

    def strike_removal(self) -> None:
        """One is removed, and as nodes merge it, or have, something befalls the cluster."""
        strikes = (
            lambda: self.cluster.stop_gateway(self._asked(), host=False),
            self.kill_node,
            self.cut_node,
            self.cut_all,
            self.crash_node,
            self.etcd_down,
            self.leave_behind,
            self.guests_leave,
        )
        strike = self.chance.choice(strikes)
        self.remove_snapshot()
        if self.chance.random() < 0.5:
            self._at_event.setdefault("emptied", []).append(
                lambda _gateway, _node: self._soon(strike, 0.05)
            )
        else:
            self._later(self.chance.uniform(0.0, 0.5), strike)

    def make_clone(self) -> None:
        """Somebody clones a snapshot that etcd names."""
        cluster = self.cluster
        names = [each.name for each in cluster.record.snapshots] if cluster.record else []
        if names and len(cluster.clones.known) < CLONES_MAX:
            cluster.clones.make(cluster.snapshots.known[self.chance.choice(names)], self._asked())

    def use_clone(self) -> None:
        """Somebody reads and writes a clone, at any gateway."""
        clones = self.cluster.clones.there()
        if clones:
            self.cluster.clones.use(self.chance.choice(clones), self._gateway())

    def strike_clone(self) -> None:
        """A node falls behind, a snapshot is taken and cloned, and used where the node is back.

        Or something else befalls the cluster as that is done.
        """
        cluster, node = self.cluster, self._node()
        strikes = (self.kill_node, self.kill_gateway, self.etcd_down, self.guests_leave)
        if self.chance.random() < 0.6:
            self._away(node, self.chance.uniform(1.0, 3.0), power=False)
        else:
            self._later(self.chance.uniform(0.0, 1.5), self.chance.choice(strikes))
        self._later(0.8, lambda: cluster.snapshots.take(self._asked()))
        self._later(1.2, self.make_clone)
        for pause_s in (1.6, 2.4, 3.2, 4.5):
            self._later(pause_s + self.chance.uniform(0.0, 0.5), self.use_clone)

    def _store_in_one_set(self, gateway: int) -> None:
        """The nodes of one replica set store it, those of another one do not hear of it.

        The gateway dies, and the first ones go: the next holder hears only the others for a while.
        """
        cluster = self.cluster
        record = cluster.record
        if record is None or len(record.sets) < 2:
            return
        stored, deaf = self.chance.sample(range(len(record.sets)), 2)
        apart = set(record.sets[deaf]) - set(record.sets[stored])
        cluster.say(f"{sorted(apart)} do not hear of the snapshot")
        nodes = [cluster.names.index(name) for name in sorted(apart)]
        for node in nodes:
            cluster.world.set_path(gateway, node, True, False)

        def strike() -> None:
            cluster.stop_gateway(gateway, host=False)
            for node in nodes:
                cluster.world.set_path(gateway, node, True, True)
            for name in record.sets[stored]:
                self._away(cluster.names.index(name), self.chance.uniform(4.0, 9.0), power=False)

        self._later(self.chance.uniform(0.3, 2.0), strike)

    def _cut_etcd_then_kill(self, gateway: int) -> None:
        """etcd takes the record, nobody hears of it, and the gateway dies with writes since.

        Meanwhile others try to read what etcd names.
        """
        cluster = self.cluster
        path = cluster.gateway_paths[gateway]
        cluster.say(f"gate-{gateway} hears nothing of etcd any more")
        path.back = False
        pause_s = self.chance.choice((0.5, 1.5, 3.0))
        for read_s in (0.3, 1.2, 1.4):
            self._later(read_s, self.read_snapshot)
        cluster.clock.after(pause_s, partial(cluster.stop_gateway, gateway, host=False))

        def undo() -> None:
            path.back = True

        cluster.clock.after(pause_s + 0.5, undo)


def _ask(cluster: Cluster, name: str, gateway: int) -> None:
    cluster.rollbacks.ask(name, gateway, force=True)
