"""Lines between two members that are cut, in one direction or both, while a client writes."""

from __future__ import annotations

import re
import time
from concurrent.futures import TimeoutError as StillWaiting
from random import Random

import pytest

from tests.devcluster import CommandError
from tests.faults.load import drawn_seed, plays_each, rounds
from tests.faults.nbd_session import NbdSession
from tests.faults.test_silent import open_at
from tests.faults.writing import await_progress, writing
from tests.hosts.cluster import HostCluster

# A hang detector: the design's budget for a silent node is 6 s.
STALL_S = 40.0
HEAL_TIMEOUT_S = 60.0
LONGEST_CUT_S = 9.0
CUT_FROM_ETCD_S = 13.0


def stale(hosts: HostCluster, image: str) -> set[str]:
    """What the record says; asked again while etcd, of which members are cut off, has no leader."""
    deadline = time.monotonic() + STALL_S
    while True:
        try:
            return {entry["node"] for entry in hosts.info(image)["stale"]}
        except CommandError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.2)


def await_stale(hosts: HostCluster, image: str, wanted: set[str]) -> None:
    """Returns when these are stale."""
    deadline = time.monotonic() + HEAL_TIMEOUT_S
    while (found := stale(hosts, image)) != wanted:
        assert time.monotonic() < deadline, f"stale are {found}, not {wanted}"
        time.sleep(0.2)


@pytest.mark.parametrize("direction", ["to", "from"])
def test_node_cut_off_from_the_gateway_in_one_direction_is_left_behind_and_healed(
    hosts: HostCluster, direction: str
) -> None:
    image = f"one-way-{direction}"
    hosts.create(image, "16M")
    with NbdSession(hosts.url_at("gateway1", image), 1) as session:
        session.call("write", 0, 64, 1)
        ends = (["gateway1"], ["node2"]) if direction == "to" else (["node2"], ["gateway1"])
        hosts.network.cut(*ends)
        session.submit("write", 0, 64, 2).result(timeout=STALL_S)
        session.submit("flush").result(timeout=STALL_S)
        # The node itself is well: it has etcd, and a gateway that reaches it.
        assert stale(hosts, image) == {"node2"}
        session.call("write", 64, 64, 3)
        hosts.network.mend()
        await_stale(hosts, image, set())
        assert session.call("read", 0, 128) == [2] * 64 + [3] * 64
    hosts.must_be_equal(image)


def test_nodes_that_lose_etcd_serve_on(hosts: HostCluster) -> None:
    hosts.create("nodes", "16M")
    with NbdSession(hosts.url_at("gateway1", "nodes"), 1) as session:
        session.call("write", 0, 64, 1)
        hosts.network.part(hosts.nodes, hosts.etcds)
        # Longer than what keeps a node registered lives.
        session.go_on(12, 64)
        hosts.network.mend()
        hosts.await_health("ok")
        assert stale(hosts, "nodes") == set()
    hosts.must_be_equal("nodes")


MEMBERS = ("gateway1", "node2", "arbiter")
PARTED = [MEMBERS, *((name,) for name in MEMBERS if plays_each())]
"""Who is cut off from etcd: all together, which takes as long as one, and each alone for soaks."""


@pytest.mark.parametrize("direction", ["to", "from"])
@pytest.mark.parametrize("parted", PARTED, ids="-".join)
def test_members_cut_off_from_etcd_in_one_direction_work_on_and_say_so(
    arbiter_hosts: HostCluster, parted: tuple[str, ...], direction: str
) -> None:
    hosts = arbiter_hosts
    image = f"unheard-{direction}"
    hosts.create(image, "16M")
    with NbdSession(hosts.url_at("gateway1", image), 1) as session:
        session.call("write", 0, 64, 1)
        ends = (parted, hosts.etcds) if direction == "to" else (hosts.etcds, parted)
        hosts.network.cut(*ends)
        # Longer than what keeps them registered lives.
        session.go_on(CUT_FROM_ETCD_S, 64)
        status = hosts.json("status")
        assert status["health"] == "degraded", status
        told = "\n".join(each["what"] for each in status["problems"])
        for name in parted:
            said = "is cut off from etcd" if name == "gateway1" else "is not registered in etcd"
            assert re.search(f"{name} on .* {said}", told), told
        hosts.network.mend()
        hosts.await_health("ok")
        session.go_on(1, 64)
        assert stale(hosts, image) == set()
    hosts.must_be_equal(image)
    hosts.remove(image)


def test_etcd_member_cut_off_from_its_peers_is_left_for_another(hosts: HostCluster) -> None:
    hosts.create("leader", "16M")
    with NbdSession(hosts.url_at("gateway1", "leader"), 1) as session:
        session.call("write", 0, 64, 1)
        chance = Random(drawn_seed())
        for _ in range(rounds(1)):
            member = chance.choice(hosts.etcds)
            print(f"  {member}")
            others = [other for other in hosts.etcds if other != member]
            # Whoever asks this member is not told that it has lost its cluster.
            hosts.network.part([member], others)
            hosts.kill("node3")
            session.submit("write", 0, 64, 2).result(timeout=STALL_S)
            hosts.network.mend()
            hosts.run("node3")
            await_stale(hosts, "leader", set())
    hosts.must_be_equal("leader")


def test_random_partitions_under_writes_lose_nothing_and_heal(hosts: HostCluster) -> None:
    hosts.create("random", "32M")
    first = drawn_seed()
    with NbdSession(hosts.url_at("gateway1", "random"), first) as session:
        with writing(session, first) as writer:
            for number in range(rounds(2)):
                chance = Random(first if number == 0 else drawn_seed(number))
                some, others = _draw(chance, hosts)
                direction = chance.choice(["both", "to", "from"])
                duration_s = chance.uniform(0.5, LONGEST_CUT_S)
                print(f"  {some} and {others}, {direction}, {duration_s:.1f} s")
                if direction in ("both", "to"):
                    hosts.network.cut(some, others)
                if direction in ("both", "from"):
                    hosts.network.cut(others, some)
                time.sleep(duration_s)
                hosts.network.mend()
                print(f"  flushes are answered after {await_progress(writer):.1f} s")
            await_stale(hosts, "random", set())
        assert writer.verify(session) == []
    hosts.await_health("ok")
    hosts.must_be_equal("random")
    with open_at(hosts, "gateway2", "random") as session:
        assert session.blocks
    hosts.must_be_equal("random")


def _draw(chance: Random, hosts: HostCluster) -> tuple[list[str], list[str]]:
    """Two groups between which the lines are cut; never the client's own host as a whole."""
    node = chance.choice(hosts.nodes[1:])
    everybody = list(hosts.members())
    groups = [
        (["gateway1"], [node]),
        (["gateway1"], hosts.nodes[1:]),
        (["gateway1"], hosts.etcds),
        (["gateway1"], [chance.choice(hosts.etcds)]),
        ([node], hosts.etcds),
        (hosts.nodes, hosts.etcds),
        ([chance.choice(hosts.etcds)], hosts.etcds),
        (hosts.beside(node), [name for name in everybody if name not in hosts.beside(node)]),
        (["gateway1"], [name for name in everybody if name != "gateway1"]),
    ]
    return chance.choice(groups)


def test_node_behind_two_cuts_waits_for_etcd(hosts: HostCluster) -> None:
    """No membership changes without etcd: the write waits until it is there, and no longer."""
    hosts.create("blind", "16M")
    with NbdSession(hosts.url_at("gateway1", "blind"), 1) as session:
        session.call("write", 0, 64, 1)
        hosts.network.part(["gateway1"], [*hosts.etcds, "node3"])
        waiting = session.submit("write", 0, 64, 2)
        with pytest.raises(StillWaiting):
            waiting.result(timeout=7)
        for member in hosts.etcds:
            hosts.network.set(None, ["gateway1"], [member])
            hosts.network.set(None, [member], ["gateway1"])
        assert waiting.result(timeout=STALL_S) == []
        assert stale(hosts, "blind") == {"node3"}
        hosts.network.mend()
        await_stale(hosts, "blind", set())
    hosts.must_be_equal("blind")
