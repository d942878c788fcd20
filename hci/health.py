"""Whether all is well with a cluster that was looked at and, if not, what to do.

It goes by a `Survey` alone and asks nobody. Each problem says what happened, to what, and what a
person can do about it; where nothing has to be done it says so.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from hci import control_pb2 as pb
from hci.survey import ArbiterView, GatewayView, NodeView, Survey
from shard.geometry import format_size

SHOWN = 2
NAMED = 5
"""Images of which a screen tells the same problem in full, and how many more it names."""


class Health(StrEnum):
    """The cluster in one word, from best to worst."""

    OK = "ok"
    HEALING = "healing"
    """Not well, and will be by itself."""
    DEGRADED = "degraded"
    """All images are served, and something will not be well before a person sees to it."""
    UNAVAILABLE = "unavailable"
    """Some image cannot be written, or nothing can be said."""


class Harm(StrEnum):
    """What a problem does to the data of images that are served all the same."""

    NONE = "none"
    COPIES = "copies"
    """There are fewer intact copies than there should be."""
    DAMAGE = "damage"
    """Something of it cannot be read, or nothing says which copy of it is right."""


@dataclass(frozen=True)
class Problem:
    """One thing that is not well, and what a person can do about it.

    `image`: where it is of one image alone. Others may have the same; see `on_a_screen`.
    """

    health: Health
    what: str
    advice: str
    image: str = ""
    harm: Harm = Harm.NONE

    @property
    def kind(self) -> tuple[Health, str]:
        """Return what is equal for all images that need the same, and for nothing else."""
        return self.health, self.advice.replace(self.image, "") if self.image else self.what


def problems(found: Survey) -> Sequence[Problem]:
    """Return what is not well, the worst first."""
    order = list(Health)
    return sorted(judge(found), key=lambda problem: -order.index(problem.health))


def health_of(judged: Sequence[Problem]) -> Health:
    """Return the health of a cluster with these problems, of which the worst comes first."""
    return judged[0].health if judged else Health.OK


def in_words(judged: Sequence[Problem]) -> str:
    """Return the health of a cluster with these problems, and what it means, for a person."""
    health = health_of(judged)
    if health is not Health.DEGRADED:
        return _WORDS[health]
    harms = {problem.harm for problem in judged}
    told = [words for harm, words in _HARMS.items() if harm in harms]
    return f"degraded: all images are served{''.join(told)}; it will not be well by itself"


_WORDS = {
    Health.OK: "well",
    Health.HEALING: "healing: it will be well by itself",
    Health.UNAVAILABLE: "unavailable",
}

_HARMS = {
    Harm.COPIES: ", some with fewer copies than there should be",
    Harm.DAMAGE: ", and some of their data is damaged",
}


def on_a_screen(judged: Sequence[Problem]) -> Iterator[Problem]:
    """Yield what a screen has room for: of images with the same problem the first few."""
    same: dict[tuple[Health, str], list[Problem]] = {}
    for problem in judged:
        same.setdefault(problem.kind, []).append(problem)
    for (health, _), of_kind in same.items():
        yield from of_kind[:SHOWN]
        more = [problem.image for problem in of_kind[SHOWN:]]
        if more:
            names = ", ".join(more[:NAMED]) + (", …" if len(more) > NAMED else "")
            advice = "as above; `hci status --json` lists all"
            yield Problem(health, f"{len(more)} more like the one above: {names}", advice)


def judge(found: Survey) -> Iterator[Problem]:
    """Yield what is not well."""
    if found.etcd:
        advice = "start it: `hci dev run etcd`" if found.is_dev else "start etcd on its hosts"
        yield Problem(Health.UNAVAILABLE, found.etcd, advice)
    if found.lost:
        yield Problem(
            Health.UNAVAILABLE,
            f"etcd lost history: {found.lost}. Open images are served as long as their nodes "
            "are there; nothing is opened, made or deleted, and no node is left behind",
            "put etcd's latest state back if there is one; else see what the nodes know with "
            "`hci cluster recover --dry-run`, and rebuild it with `hci cluster recover`",
        )
    yield from _judge_nodes(found)
    yield from _judge_gateways(found)
    yield from _judge_arbiters(found)
    yield from _judge_pools(found)
    yield from _judge_images(found)


def _start(found: Survey, kind: str, member: NodeView | GatewayView | ArbiterView) -> str:
    """Say how a member is started: whatever runs it on its host, this ends in that command."""
    if found.is_dev:
        return f"start it: `hci dev run {member.name}`"
    serve = f"`hci {kind} serve --name {member.name}`"
    return f"start {serve} on {member.host}, or the service that runs it there"


_TO_ETCD = (
    "it is tried again each second: see to what it says, to the way from {host} to etcd, and to "
    "the log of {name}"
)
_DISK = (
    "see to its disk (`dmesg`, `smartctl`). Once that is sound {start}; what is on it is healed. "
    "If it is lost, see `A lost disk` in the operations manual"
)


def _judge_nodes(found: Survey) -> Iterator[Problem]:
    sets = [placement.sets for placement in found.placements.values()]
    sets += [record.sets for record in found.images.values()]
    placed = {name for of_one in sets for members in of_one for name in members}
    for node in found.nodes:
        harm = Harm.COPIES if node.name in placed else Harm.NONE
        start = _start(found, "node", node)
        if node.history_lost:
            told = f"{node.name} on {node.host} does not go by etcd: {node.trouble}"
            yield Problem(Health.UNAVAILABLE, told, "see above; it goes on by itself after that")
        elif node.state == "starting":
            yield from _judge_waiting(found, node.name, node.host, node.trouble)
        elif node.state == "failed":
            what = f"{node.name} on {node.host} has failed: {node.trouble}"
            yield Problem(Health.DEGRADED, what, _DISK.format(start=start), harm=harm)
        elif node.state == "down" and node.ended:
            what = f"{node.name} on {node.host} is down; it ended with: {node.ended}"
            yield Problem(Health.DEGRADED, what, f"see to that, then {start}", harm=harm)
        elif node.state == "down":
            # There is no more to say than that it does not answer. Of this machine's it would be
            # known if it had ended with an error.
            advice = start if found.is_dev else f"{start}; if it ended by itself its log tells why"
            yield Problem(Health.DEGRADED, f"{node.name} on {node.host} is down", advice, harm=harm)
        elif node.state != "up":
            told = f" ({node.trouble})" if node.trouble else ""
            what = f"{node.name} on {node.host} is {node.state}{told}"
            yield Problem(Health.DEGRADED, what, start, harm=harm)
        elif node.trouble:
            what = f"{node.name} on {node.host}: {node.trouble}"
            yield Problem(Health.DEGRADED, what, f"see to it, and to the log of {node.name}")
        if node.unknown and not found.lost:
            size = format_size(node.unknown_bytes)
            yield Problem(
                Health.OK,
                f"{node.name} keeps {size} of {len(node.unknown)} images that etcd does not know",
                "`hci cluster leftovers` shows them, and what can be done",
            )


def _judge_waiting(found: Survey, name: str, host: str, trouble: str) -> Iterator[Problem]:
    """A member that is not registered in etcd: it has just been started, or cannot go on."""
    if not trouble:
        yield Problem(Health.HEALING, f"{name} is starting", "wait")
    elif not found.etcd:
        # Where etcd answers nobody, that has been said, and is all that there is to do.
        what = f"{name} on {host} is not registered in etcd: {trouble}"
        yield Problem(Health.DEGRADED, what, _TO_ETCD.format(name=name, host=host))


def _judge_gateways(found: Survey) -> Iterator[Problem]:
    up = [gateway for gateway in found.gateways if gateway.state == "up"]
    for gateway in found.gateways:
        if gateway.state == "starting":
            yield from _judge_waiting(found, gateway.name, gateway.host, gateway.trouble)
        elif gateway.state == "silent":
            what = f"{gateway.name} on {gateway.host} runs and cannot be asked: {gateway.trouble}"
            advice = "see to the network, and that its `control` is an address for other hosts"
            yield Problem(Health.DEGRADED, what, advice)
        elif gateway.state != "up":
            worst = Health.DEGRADED if up else Health.UNAVAILABLE
            start = _start(found, "gateway", gateway)
            yield Problem(worst, f"{gateway.name} is {gateway.state}", start)
        elif gateway.trouble and not found.etcd:
            what = (
                f"{gateway.name} on {gateway.host} is cut off from etcd: {gateway.trouble}. Other "
                "gateways may take its images over"
            )
            advice = _TO_ETCD.format(name=gateway.name, host=gateway.host)
            yield Problem(Health.DEGRADED, what, advice)
        for image in gateway.images:
            for problem in (*_judge_open(image), *_judge_rot(found, image)):
                yield replace(problem, image=image.name)
    yield from _judge_scrubs(found)


def _judge_arbiters(found: Survey) -> Iterator[Problem]:
    for arbiter in found.arbiters:
        if arbiter.state == "starting" and arbiter.history_lost:
            told = f"arbiter {arbiter.name} does not go by etcd: {arbiter.trouble}"
            yield Problem(Health.UNAVAILABLE, told, "see above; it goes on by itself after that")
        elif arbiter.state == "starting":
            name = f"arbiter {arbiter.name}"
            yield from _judge_waiting(found, name, arbiter.host, arbiter.trouble)
        elif arbiter.state != "up":
            told = f" ({arbiter.trouble})" if arbiter.trouble and arbiter.state != "down" else ""
            start = _start(found, "arbiter", arbiter)
            yield Problem(
                Health.DEGRADED if arbiter.pools or found.etcd else Health.OK,
                f"arbiter {arbiter.name} on {arbiter.host} is {arbiter.state}{told}: without it "
                "writes stall as soon as a node is lost",
                f"{start}; if it is lost for good: `hci arbiter replace`",
            )
        elif arbiter.trouble:
            yield Problem(
                Health.DEGRADED,
                f"arbiter {arbiter.name}: {arbiter.trouble}",
                f"start another one, then `hci arbiter replace {arbiter.name} NEW`",
            )


def _judge_open(image: pb.OpenImage) -> Iterator[Problem]:
    told = f": {image.trouble}" if image.trouble else ""
    if image.HasField("heal"):
        heal = image.heal
        shards = f"{heal.shards_total - heal.shards_done} of {heal.shards_total} shards"
        what = f"{heal.node} is healed for {image.name}, {shards} to go"
        advice = "wait; `hci heal status` tells how long"
        yield Problem(Health.HEALING, what, advice, harm=Harm.COPIES)
    left = image.counters["levelling_shards_left"] if image.counters else 0
    if left:
        total = left + image.counters["levelling_shards_done"]
        what = f"replicas of {image.name} are made equal, {left} of {total} shards to go"
        yield Problem(Health.HEALING, what, "wait; what a guest asks for comes first")
    if image.state == pb.OpenImage.STATE_OPENING:
        yield Problem(Health.HEALING, f"replicas of {image.name} are made equal", "wait")
    elif image.state == pb.OpenImage.STATE_READS_ONLY:
        what = f"writes to {image.name} wait{told}"
        yield Problem(Health.UNAVAILABLE, what, "bring its nodes back; writes resume by themselves")
    elif image.state == pb.OpenImage.STATE_CLOSING and image.trouble:
        what = f"{image.name} cannot be closed{told}"
        yield Problem(Health.UNAVAILABLE, what, "bring them back; it opens again after that")
    elif image.state == pb.OpenImage.STATE_STALLED:
        what = f"{image.name} is stalled{told}"
        yield Problem(
            Health.UNAVAILABLE, what, "bring etcd and its nodes back; it resumes by itself"
        )


def _judge_rot(found: Survey, image: pb.OpenImage) -> Iterator[Problem]:
    waiting, bad = image.counters["rot_waiting"], image.counters["rot_unrepairable"]
    if waiting:
        what = f"{waiting} damaged places of {image.name} are being repaired"
        yield Problem(
            Health.HEALING, what, "wait, and watch the disk: see `bitrot_found` in the log"
        )
    if bad and image.name not in found.scrubs:
        what = f"{bad} blocks of {image.name} are damaged on every node"
        yield Problem(Health.DEGRADED, what, _RESTORE.format(image.name), harm=Harm.DAMAGE)


_RESTORE = (
    "reads of them fail until they are written as a whole: restore them in the guest or from a "
    "backup, then `hci scrub start {0}`; `hci scrub status {0}` names them"
)


def _judge_scrubs(found: Survey) -> Iterator[Problem]:
    for name, record in sorted(found.scrubs.items()):
        every = record.bad
        bad = sum(blocks.blocks for blocks in every if not blocks.nodes)
        differ = sum(blocks.blocks for blocks in every if blocks.nodes)
        if bad:
            what = f"{bad} blocks of {name} are damaged on every node"
            yield Problem(Health.DEGRADED, what, _RESTORE.format(name), name, Harm.DAMAGE)
        if differ:
            what = (
                f"{differ} blocks of {name} differ between nodes, and nothing says which is right"
            )
            advice = f"have the guest write them again; `hci scrub status {name}` names them"
            yield Problem(Health.DEGRADED, what, advice, name, Harm.DAMAGE)


def _judge_pools(found: Survey) -> Iterator[Problem]:
    up = {node.name for node in found.nodes if node.state == "up"}
    for pool in found.pools.values():
        if pool.arbiter is not None and not pool.filled:
            yield Problem(
                Health.DEGRADED,
                f"pool {pool.name}: its arbiter {pool.arbiter} is not filled and grants nothing",
                "run the interrupted `hci arbiter replace` again",
            )
        placement = found.placements.get(pool.name)
        for index, members in enumerate(placement.sets if placement is not None else ()):
            there = [name for name in members if name in up]
            if len(there) < pool.policy.quorum:
                yield Problem(
                    Health.UNAVAILABLE,
                    f"pool {pool.name}: replica set {index} has {len(there)} of {len(members)} "
                    f"nodes, its writes wait for {pool.policy.quorum}",
                    f"start {' or '.join(name for name in members if name not in up)}",
                )


def _judge_images(found: Survey) -> Iterator[Problem]:
    up = {node.name for node in found.nodes if node.state == "up"}
    # One that waits for etcd votes all the same, unless it does not believe it.
    votes = (each for each in found.arbiters if each.state in ("up", "starting"))
    voting = {pool for each in votes if not each.history_lost for pool in each.pools}
    for name, record in found.images.items():
        for index, members in enumerate(record.sets):
            in_sync = [node for node in members if node not in record.stale.get(index, {})]
            if members and sum(node in up for node in in_sync) < record.policy.quorum:
                yield Problem(
                    Health.UNAVAILABLE,
                    f"image {name}: of its nodes in sync ({', '.join(in_sync)}) too few are up",
                    "start them; writes resume by themselves",
                    name,
                )
            elif record.policy.has_arbiter and record.pool not in voting and not set(in_sync) <= up:
                missing = " and ".join(node for node in in_sync if node not in up)
                yield Problem(
                    Health.UNAVAILABLE,
                    f"image {name}: {missing} and the arbiter are away: writes wait",
                    f"start the arbiter or {missing}; writes resume by themselves",
                    name,
                )
    yield from _judge_stale(found, up)
    yield from _judge_slow(found)


def _judge_slow(found: Survey) -> Iterator[Problem]:
    """A node that answers is slow for some images, or all."""
    slow: dict[str, list[tuple[int, str]]] = {}
    for gateway in found.gateways:
        for image in gateway.images:
            for node in image.slow:
                if node.lag_ms:
                    slow.setdefault(node.node, []).append((node.lag_ms, image.name))
    for name, lags in sorted(slow.items()):
        lag_ms, waits = max(lags)
        yield Problem(
            Health.DEGRADED,
            f"{name} is slow: writes to image {waits} wait {lag_ms} ms for it alone",
            f"see to the disk and the network of {name}",
        )


def _judge_stale(found: Survey, up: set[str]) -> Iterator[Problem]:
    """A stale node that runs is healed by whatever gateway runs; another one needs a person."""
    stale: dict[str, list[str]] = {}
    for name, record in found.images.items():
        for nodes_since in record.stale.values():
            for node in nodes_since:
                stale.setdefault(node, []).append(name)
    images = [image for gateway in found.gateways for image in gateway.images]
    healed = {(image.heal.node, image.name) for image in images if image.HasField("heal")}
    trouble = {image.name: image.trouble for image in images if image.trouble}
    rests = {
        (slow.node, image.name): slow.rests_s
        for image in images
        for slow in image.slow
        if slow.rests_s
    }
    healer = any(gateway.state == "up" for gateway in found.gateways)
    for node, names in sorted(stale.items()):
        waiting = [name for name in dict.fromkeys(names) if (node, name) not in healed]
        if not waiting:
            continue
        shown = ", ".join(waiting[:3])
        shown += f" and {len(waiting) - 3} more" if len(waiting) > 3 else ""
        what = f"{node} is stale for {shown}"
        why = next((trouble[name] for name in waiting if name in trouble), "")
        health = Health.DEGRADED
        if node not in up:
            advice = f"it missed writes and is not read; start {node}"
        elif resting := [rests[node, name] for name in waiting if (node, name) in rests]:
            advice = f"it was too slow; it is healed in {max(resting):.0f} s; see to its disk"
        elif why:
            advice = f"{why}; it is tried again by itself"
        elif not healer:
            advice = "start a gateway: it heals the node"
        else:
            health, advice = Health.HEALING, "wait: it is healed by itself"
        yield Problem(health, what, advice, harm=Harm.COPIES)
