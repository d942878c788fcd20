"""What is said of a cluster in each state: its health, and what a person can do."""

from dataclasses import replace

import pytest

from etcd.images import ImageRecord
from etcd.records import PlacementRecord, PoolRecord
from hci import control_pb2 as pb
from hci.health import NAMED, SHOWN, Health, health_of, in_words, on_a_screen, problems
from hci.survey import ArbiterView, GatewayView, NodeView, Survey
from shard.ids import image_id
from shard.membership import Policy
from shard.placement import FailureDomain
from tests.unit.samples import image_record

SETS = (("node1", "node2", "node3"),)


CUT_OFF = "etcd is not reachable"


def node(name: str, state: str = "up", trouble: str = "") -> NodeView:
    return NodeView(name, state, f"host-of-{name}", "default", "127.0.0.1:1", None, 1, 1, trouble)


def image(**changes: object) -> ImageRecord:
    return image_record(image_id("ab" * 16), **changes)


WELL = Survey(
    etcd="",
    nodes=(node("node1"), node("node2"), node("node3")),
    gateways=(GatewayView("gateway1", "up", "host1", ""),),
    pools={
        "vms": PoolRecord(
            name="vms",
            policy=Policy.REPLICA_3,
            shard_bytes=4 << 20,
            replica_sets=1,
            failure_domain=FailureDomain.HOST,
        )
    },
    placements={"vms": PlacementRecord(pool="vms", version=1, sets=SETS)},
    images={"vms/a": image()},
    is_dev=True,
)


PAIR = replace(
    WELL,
    nodes=(node("node1"), node("node2")),
    pools={
        "vms": replace(WELL.pools["vms"], policy=Policy.THIN_ARBITER, arbiter="witness"),
    },
    placements={"vms": PlacementRecord(pool="vms", version=1, sets=(("node1", "node2"),))},
    images={"vms/a": image(policy=Policy.THIN_ARBITER, sets=(("node1", "node2"),))},
    arbiters=(ArbiterView("witness", "up", "far", "far:1", "f" * 32, ("vms",), 1, ""),),
)


def witness(state: str, trouble: str = "") -> ArbiterView:
    return replace(PAIR.arbiters[0], state=state, trouble=trouble)


@pytest.mark.parametrize(
    ("found", "health", "told"),
    [
        (PAIR, Health.OK, ""),
        (
            replace(PAIR, arbiters=(witness("down"),)),
            Health.DEGRADED,
            "without it writes stall as soon as a node is lost",
        ),
        (
            replace(PAIR, arbiters=(witness("down"),)),
            Health.DEGRADED,
            "start it: `hci dev run witness`; if it is lost for good: `hci arbiter replace`",
        ),
        (replace(PAIR, arbiters=(witness("starting"),)), Health.HEALING, "wait"),
        (
            # It votes: with a node away writes go on.
            replace(
                PAIR,
                nodes=(node("node1"), node("node2", "down")),
                arbiters=(witness("starting", CUT_OFF),),
            ),
            Health.DEGRADED,
            f"arbiter witness on far is not registered in etcd: {CUT_OFF}",
        ),
        (
            replace(PAIR, arbiters=(witness("up", "votes/x is damaged"),)),
            Health.DEGRADED,
            "hci arbiter replace witness NEW",
        ),
        (
            replace(PAIR, nodes=(node("node1"), node("node2", "down"))),
            Health.DEGRADED,
            "hci dev run node2",
        ),
        (
            replace(
                PAIR, nodes=(node("node1"), node("node2", "down")), arbiters=(witness("down"),)
            ),
            Health.UNAVAILABLE,
            "image vms/a: node2 and the arbiter are away: writes wait",
        ),
        (
            replace(PAIR, pools={"vms": replace(PAIR.pools["vms"], filled=False)}),
            Health.DEGRADED,
            "run the interrupted `hci arbiter replace` again",
        ),
    ],
)
def test_pair_with_an_arbiter_says_how_it_is(found: Survey, health: Health, told: str) -> None:
    assert health_of(problems(found)) is health
    said = " ".join(f"{each.what} {each.advice}" for each in problems(found))
    assert told in said


def opened(state: "pb.OpenImage.State.ValueType", trouble: str = "") -> GatewayView:
    image = pb.OpenImage(name="vms/a", state=state, trouble=trouble)
    return GatewayView("gateway1", "up", "h", "", [image])


def healing(trouble: str, heal: pb.Progress | None = None) -> GatewayView:
    serving = pb.OpenImage.STATE_SERVING
    image = pb.OpenImage(name="vms/a", state=serving, trouble=trouble, heal=heal)
    return GatewayView("gateway1", "up", "h", "", [image])


def slow(node: pb.SlowNode) -> GatewayView:
    image = pb.OpenImage(name="vms/a", state=pb.OpenImage.STATE_SERVING, slow=[node])
    return GatewayView("gateway1", "up", "h", "", [image])


def rotten() -> GatewayView:
    counters = {"rot_waiting": 0, "rot_unrepairable": 3}
    image = pb.OpenImage(name="vms/a", state=pb.OpenImage.STATE_SERVING, counters=counters)
    return GatewayView("gateway1", "up", "h", "", [image])


def test_cluster_without_problems_is_ok() -> None:
    assert problems(WELL) == []
    assert health_of(problems(WELL)) is Health.OK


@pytest.mark.parametrize(
    ("found", "health", "told"),
    [
        (
            replace(WELL, nodes=(node("node1"), node("node2", "down"), node("node3"))),
            Health.DEGRADED,
            "start it: `hci dev run node2`",
        ),
        (
            replace(WELL, nodes=(node("node1"), node("node2", "down"), node("node3", "down"))),
            Health.UNAVAILABLE,
            "start node2 or node3",
        ),
        (
            replace(WELL, nodes=(node("node1"), node("node2"), node("node3", "starting"))),
            Health.HEALING,
            "wait",
        ),
        (
            # Said to be healing, "wait", for as long as a person did not mend the network.
            replace(WELL, nodes=(node("node1"), node("node2"), node("node3", "starting", CUT_OFF))),
            Health.DEGRADED,
            f"node3 on host-of-node3 is not registered in etcd: {CUT_OFF}",
        ),
        (
            replace(WELL, gateways=(replace(WELL.gateways[0], trouble=CUT_OFF),)),
            Health.DEGRADED,
            f"gateway1 on host1 is cut off from etcd: {CUT_OFF}",
        ),
        (
            replace(WELL, gateways=(GatewayView("gateway1", "starting", "h", CUT_OFF),)),
            Health.DEGRADED,
            f"gateway1 on h is not registered in etcd: {CUT_OFF}",
        ),
        (
            replace(WELL, gateways=(GatewayView("gateway1", "starting", "h", ""),)),
            Health.HEALING,
            "gateway1 is starting wait",
        ),
        (
            replace(WELL, nodes=(node("node1"), node("node2"), node("node3", "failed", "EIO"))),
            Health.DEGRADED,
            "node3 on host-of-node3 has failed: EIO see to its disk",
        ),
        (
            replace(
                WELL,
                nodes=(
                    node("node1"),
                    node("node2"),
                    replace(node("node3", "down"), ended="a sync failed: Input/output error"),
                ),
            ),
            Health.DEGRADED,
            "it ended with: a sync failed: Input/output error see to that, then start it",
        ),
        (
            replace(
                WELL, nodes=(node("node1"), node("node2"), node("node3", "down")), is_dev=False
            ),
            Health.DEGRADED,
            "start `hci node serve --name node3` on host-of-node3, or the service",
        ),
        (
            replace(WELL, images={"vms/a": image(stale={0: {"node3": 1}}, generation=2)}),
            Health.HEALING,
            "node3 is stale for vms/a wait: it is healed by itself",
        ),
        (
            replace(
                WELL,
                nodes=(node("node1"), node("node2"), node("node3", "down")),
                images={"vms/a": image(stale={0: {"node3": 1}}, generation=2)},
            ),
            Health.DEGRADED,
            "node3 is stale for vms/a it missed writes and is not read; start node3",
        ),
        (
            replace(
                WELL,
                gateways=(healing("the heal of node3 ended early: NoSpace"),),
                images={"vms/a": image(stale={0: {"node3": 1}}, generation=2)},
            ),
            Health.DEGRADED,
            "node3 is stale for vms/a the heal of node3 ended early: NoSpace",
        ),
        (
            replace(WELL, gateways=(slow(pb.SlowNode(node="node3", lag_ms=340)),)),
            Health.DEGRADED,
            "node3 is slow: writes to image vms/a wait 340 ms for it alone",
        ),
        (
            replace(
                WELL,
                gateways=(slow(pb.SlowNode(node="node3", rests_s=42.0)),),
                images={"vms/a": image(stale={0: {"node3": 1}}, generation=2)},
            ),
            Health.DEGRADED,
            "node3 is stale for vms/a it was too slow; it is healed in 42 s",
        ),
        (
            replace(
                WELL,
                gateways=(healing("", pb.Progress(node="node3", shards_done=3, shards_total=7)),),
                images={"vms/a": image(stale={0: {"node3": 1}}, generation=2)},
            ),
            Health.HEALING,
            "node3 is healed for vms/a, 4 of 7 shards to go",
        ),
        (
            replace(
                WELL,
                nodes=(node("node1"), node("node2", "down"), node("node3")),
                images={"vms/a": image(stale={0: {"node3": 1}}, generation=2)},
            ),
            Health.UNAVAILABLE,
            "image vms/a: of its nodes in sync (node1, node2) too few are up",
        ),
        (
            replace(WELL, gateways=(GatewayView("gateway1", "down", "h", ""),)),
            Health.UNAVAILABLE,
            "start it: `hci dev run gateway1`",
        ),
        (
            replace(WELL, gateways=(*WELL.gateways, GatewayView("gateway2", "down", "h", ""))),
            Health.DEGRADED,
            "start it: `hci dev run gateway2`",
        ),
        (
            replace(WELL, gateways=(opened(pb.OpenImage.STATE_OPENING),)),
            Health.HEALING,
            "replicas of vms/a are made equal",
        ),
        (
            replace(WELL, gateways=(opened(pb.OpenImage.STATE_READS_ONLY),)),
            Health.UNAVAILABLE,
            "writes to vms/a wait",
        ),
        (
            replace(WELL, gateways=(opened(pb.OpenImage.STATE_CLOSING, "it waits for node2"),)),
            Health.UNAVAILABLE,
            "vms/a cannot be closed: it waits for node2",
        ),
        (
            replace(WELL, gateways=(opened(pb.OpenImage.STATE_STALLED),)),
            Health.UNAVAILABLE,
            "vms/a is stalled",
        ),
        (Survey(etcd="etcd is not reachable"), Health.UNAVAILABLE, "start etcd on its hosts"),
    ],
)
def test_cluster_with_a_problem_says_how_bad_it_is_and_what_to_do(
    found: Survey, health: Health, told: str
) -> None:
    assert health_of(problems(found)) is health
    worst = [each for each in problems(found) if each.health is health]
    assert any(told in f"{each.what} {each.advice}" for each in worst)
    assert problems(found)[: len(worst)] == worst, "the worst come first"


def test_image_that_many_nodes_are_stale_for_is_counted_not_listed() -> None:
    images = {
        f"vms/{number}": image(stale={0: {"node3": 1}}, generation=2) for number in range(100)
    }
    (problem,) = problems(replace(WELL, images=images))
    assert problem.what == "node3 is stale for vms/0, vms/1, vms/2 and 97 more"


def test_a_screen_has_room_for_a_hundred_images_that_wait_for_the_same() -> None:
    away = (node("node1"), node("node2", "down"), node("node3", "down"))
    images = {f"vms/{number:03}": image() for number in range(100)}
    waits = pb.OpenImage.STATE_READS_ONLY
    opened = [pb.OpenImage(name=name, state=waits, trouble="node2") for name in images]
    busy = replace(WELL.gateways[0], images=opened)
    judged = problems(replace(WELL, nodes=away, images=images, gateways=(busy,)))
    assert len(judged) == 2 + 1 + 100 + 100
    shown = list(on_a_screen(judged))
    assert len(shown) == 2 + 1 + 2 * (SHOWN + 1)
    assert [each for each in shown if not each.image and "more" not in each.what] == [
        each for each in judged if not each.image
    ]
    more = [each.what for each in shown if each.what.startswith(f"{100 - SHOWN} more")]
    assert len(more) == 2
    assert all(what.count("vms/") == NAMED for what in more)


def test_gateway_that_runs_elsewhere_and_cannot_be_asked_is_said_to_be_so() -> None:
    silent = GatewayView("gateway2", "silent", "host2", "it does not answer")
    (problem,) = problems(replace(WELL, gateways=(*WELL.gateways, silent)))
    assert problem.health is Health.DEGRADED
    assert "gateway2 on host2 runs and cannot be asked" in problem.what


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (WELL, "well"),
        (
            replace(WELL, nodes=(node("node1"), node("node2"), node("node3", "starting"))),
            "healing: it will be well by itself",
        ),
        (
            replace(WELL, nodes=(node("node1"), node("node2"), node("node3", "down"))),
            "degraded: all images are served, some with fewer copies than there should be; "
            "it will not be well by itself",
        ),
        (
            # No copy of anything is missing.
            replace(WELL, gateways=(*WELL.gateways, GatewayView("gateway2", "down", "h", ""))),
            "degraded: all images are served; it will not be well by itself",
        ),
        (
            # Nothing lies on that node.
            replace(WELL, nodes=(*WELL.nodes, node("node4", "down"))),
            "degraded: all images are served; it will not be well by itself",
        ),
        (
            replace(WELL, gateways=(rotten(),)),
            "degraded: all images are served, and some of their data is damaged; "
            "it will not be well by itself",
        ),
        (Survey(etcd="etcd is not reachable"), "unavailable"),
    ],
)
def test_health_is_told_in_words_that_are_true_of_it(found: Survey, told: str) -> None:
    assert in_words(problems(found)) == told


def test_etcd_that_is_away_is_told_once_and_not_for_each_member_too() -> None:
    waiting = Survey(
        etcd=CUT_OFF,
        nodes=(node("node1", "starting", CUT_OFF),),
        gateways=(replace(WELL.gateways[0], trouble=CUT_OFF),),
    )
    assert [problem.what for problem in problems(waiting)] == [CUT_OFF]
