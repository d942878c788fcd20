"""What befalls a cluster of hosts while an image is in use: one fault after the other, by chance.

Each leaves a quorum, or comes back by itself: nothing of it may cost a guest more than time.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from tests import reaper
from tests.devcluster import POOL
from tests.faults.nbd_session import NbdSession
from tests.faults.shard_files import shard_files
from tests.faults.test_clocks import FAR_S, at
from tests.faults.test_failing_disk import Disk
from tests.faults.test_slow_node import slow
from tests.hosts.cluster import HostCluster
from tests.hosts.line import Line
from tests.waiting import stop

ON_A_DISK = "node3"
"""The node whose disk is filled, or fails: one without a gateway beside it."""
DISK_BYTES = 8 << 30
MIB_BLOCKS = 256
BALLAST_MIB = 96
"""Three times what logs hold."""
NODES = ("node1", "node2", "node3")
SMALL_LOG = {"log_bytes": "32M"}
"""So that a full disk is felt while its node is written to, and that what is to rot is in files."""

SETTLED_S = 180.0
"""A heal that found no room is tried again a minute later at most; a hang detector."""

LONGEST_OUTAGE_S = 8.0
ROTTEN_BLOCKS = 20


SURVIVED_BY_CONNECTIONS = (
    "node_killed",
    "host_silent",
    "node_cut_off_for_a_while",
    "node_unheard_for_a_while",
    "node_deaf_for_a_while",
    "node_stopped_for_a_while",
    "node_comes_back_in_another_time",
    "gateway_stopped_for_a_while",
    "gateway_without_etcd_for_a_while",
    "gateway_unheard_by_etcd_for_a_while",
    "gateway_deaf_to_etcd_for_a_while",
    "etcd_away_for_a_while",
    "lines_bad",
    "disk_full_for_a_while",
    "disk_fails_and_is_mended",
    "disk_slow_for_a_while",
)
"""Faults that a client hears nothing of which does not connect again."""

EVERY = (
    *SURVIVED_BY_CONNECTIONS,
    "blocks_rot",
    "gateway_killed",
    "gateway_and_node_killed",
    "gateway_comes_back_in_another_time",
    "all_nodes_killed",
    "everything_killed",
)
"""All faults, for a client that connects again, of an image with data on disk."""


class Befalling:
    """The faults of one round, for an image that a guest uses through `gateway`.

    `disk` is that of the node ON_A_DISK.
    """

    def __init__(
        self, hosts: HostCluster, disk: Disk, gateway: str, image: str, chance: Random
    ) -> None:
        self._hosts = hosts
        self._disk = disk
        self._gateway = gateway
        self._image = image
        self._chance = chance
        others = [name for name in hosts.nodes if name not in hosts.beside(gateway)]
        self._node = chance.choice(others)
        self._outage_s = chance.uniform(0.5, LONGEST_OUTAGE_S)

    def fault(self, name: str) -> Callable[[], None]:
        """One of EVERY; it returns when it has begun, or is over where it says so."""
        fault: Callable[[], None] = getattr(self, name)
        return fault

    def node_killed(self) -> None:
        """Some node dies, perhaps that of the gateway's host."""
        self._hosts.kill(self._chance.choice(self._hosts.nodes))

    def host_silent(self) -> None:
        """A host's network is gone."""
        self._hosts.isolate(self._hosts.beside(self._node))

    def node_cut_off_for_a_while(self) -> None:
        """Node and gateway hear nothing of each other."""
        self._hosts.network.part([self._node], [self._gateway])
        self._pass()
        self._hosts.network.mend()

    def node_unheard_for_a_while(self) -> None:
        """The gateway hears nothing of the node, which hears it."""
        self._hosts.network.cut([self._node], [self._gateway])
        self._pass()
        self._hosts.network.mend()

    def node_deaf_for_a_while(self) -> None:
        """The node hears nothing of the gateway, which hears it."""
        self._hosts.network.cut([self._gateway], [self._node])
        self._pass()
        self._hosts.network.mend()

    def node_stopped_for_a_while(self) -> None:
        """A node's process stands still."""
        self._stand_still(self._node)

    def gateway_stopped_for_a_while(self) -> None:
        """The gateway's process stands still, for less than its lease lives."""
        self._stand_still(self._gateway)

    def gateway_without_etcd_for_a_while(self) -> None:
        """The gateway does not reach etcd, perhaps for as long as its lease lives."""
        self._hosts.network.part([self._gateway], self._hosts.etcds)
        self._pass()
        self._hosts.network.mend()

    def gateway_unheard_by_etcd_for_a_while(self) -> None:
        """etcd hears nothing of the gateway, which hears it."""
        self._hosts.network.cut([self._gateway], self._hosts.etcds)
        self._pass()
        self._hosts.network.mend()

    def gateway_deaf_to_etcd_for_a_while(self) -> None:
        """The gateway hears nothing of etcd, which hears it."""
        self._hosts.network.cut(self._hosts.etcds, [self._gateway])
        self._pass()
        self._hosts.network.mend()

    def etcd_away_for_a_while(self) -> None:
        """All of etcd dies, and is started again."""
        self._hosts.kill_together(self._hosts.etcds)
        self._pass()
        self._hosts.run_together(self._hosts.etcds)

    def lines_bad(self) -> None:
        """The gateway's packets are late, lost, doubled and out of order from now on."""
        rest = [name for name in self._hosts.members() if name != self._gateway]
        loss = self._chance.uniform(0.005, 0.03)
        line = Line(delay_ms=5, jitter_ms=3, loss=loss, duplicate=0.02, reorder=0.05)
        self._hosts.network.set(line, [self._gateway], rest)
        self._hosts.network.set(line, rest, [self._gateway])

    def disk_full_for_a_while(self) -> None:
        """The disk of a node has no room left, and then again."""
        self._disk.fill()
        self._pass()
        self._disk.make_room()

    def disk_fails_and_is_mended(self) -> None:
        """Whatever a node asks of its disk fails; it is started again with one that works."""
        self._disk.fail()
        self._pass()
        self._hosts.kill(ON_A_DISK)
        self._disk.detach()
        self._disk.attach()
        self._hosts.run(ON_A_DISK)

    def disk_slow_for_a_while(self) -> None:
        """A node answers like one whose disk is worn out."""
        with slow(self._hosts, self._node):
            self._pass()

    def blocks_rot(self) -> None:
        """Bytes flip on the disk of one node, the one that the gateway reads from."""
        near = next(name for name in self._hosts.nodes if name in self._hosts.beside(self._gateway))
        image_id = self._hosts.info(self._image)["id"]
        folder = Path(self._hosts.members()[near]["data_dir"])
        places = [
            (file, block)
            for file in shard_files(folder, image_id).values()
            for block in file.data_blocks()
        ]
        assert places, "there is nothing that could rot"
        for file, block in self._chance.sample(places, min(ROTTEN_BLOCKS, len(places))):
            file.flip(block)

    def node_comes_back_in_another_time(self) -> None:
        """A node dies, and its clock has jumped when it comes back."""
        self._restart(self._node)

    def gateway_comes_back_in_another_time(self) -> None:
        """The gateway dies, and its clock has jumped when it comes back."""
        self._restart(self._gateway)

    def gateway_killed(self) -> None:
        """The gateway dies, and is started again."""
        self._hosts.kill(self._gateway)
        self._hosts.run(self._gateway)

    def gateway_and_node_killed(self) -> None:
        """Both die, the gateway is started again."""
        self._hosts.kill_together([self._gateway, self._node])
        self._hosts.run(self._gateway)

    def all_nodes_killed(self) -> None:
        """All nodes die at once, and are started again."""
        self._hosts.kill_together(self._hosts.nodes)
        self._hosts.run_together(self._hosts.nodes)

    def everything_killed(self) -> None:
        """All members die at once, and are started again."""
        self._hosts.kill("all")
        self._hosts.run("all")

    def _pass(self) -> None:
        time.sleep(self._outage_s)

    def _stand_still(self, member: str) -> None:
        pid = int(self._hosts.members()[member]["pid"])
        stop(pid)
        self._pass()
        os.kill(pid, signal.SIGCONT)

    def _restart(self, member: str) -> None:
        self._hosts.kill(member)
        jumps = self._chance.randrange(FAR_S), self._chance.randrange(FAR_S)
        self._hosts.run_together([member], at(*jumps))


def put_into_files(hosts: HostCluster, gateway: str) -> None:
    """Has logs go round, by writes to another image: what was written before lies in files then."""
    hosts.create("ballast", f"{BALLAST_MIB}M")
    with NbdSession(hosts.url_at(gateway, "ballast"), 1) as session:
        for first in range(0, session.blocks, MIB_BLOCKS):
            session.call("write", first, MIB_BLOCKS, 1)
        session.call("flush")


def settle(hosts: HostCluster, image: str) -> None:
    """Has everything run and well again, what nobody has read since it rotted as well."""
    hosts.network.mend()
    hosts.run("all")
    hosts.await_health("ok", "healing", timeout_s=SETTLED_S)
    hosts.hci("scrub", "start", f"{POOL}/{image}", "--wait")
    hosts.await_health("ok", timeout_s=SETTLED_S)


@contextlib.contextmanager
def hosts_with_a_disk() -> Iterator[tuple[HostCluster, Disk]]:
    """Three hosts, two of them with a gateway; and the disk that the node of the third one has."""
    assert os.geteuid() == 0, "mounting needs root"
    with contextlib.ExitStack() as ends:
        folder = Path(tempfile.mkdtemp(prefix="hci-disk-"))
        ends.callback(shutil.rmtree, folder)
        reaper.watch(folder, remove=True)
        hosts = HostCluster(gateways=2, settings=dict.fromkeys(NODES, SMALL_LOG))
        ends.callback(hosts.close)
        place = hosts.directory / ON_A_DISK
        place.mkdir()
        disk = Disk(folder, place, DISK_BYTES)
        ends.callback(disk.detach)
        disk.attach()
        ends.callback(hosts.kill, "all")
        try:
            hosts.start()
            yield hosts, disk
        except BaseException:
            hosts.print_logs()
            raise
