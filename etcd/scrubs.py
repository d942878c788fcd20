"""`ScrubRecord`: how the scrub of an image stands, and what the last one found.

One for each image that was ever scrubbed or asked to be. It is no one's property: whoever asks for
a scrub and the gateway that makes it both change it, each by compare-and-set.
"""

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Self

from etcd import keys
from etcd.fields import Fields, Json
from etcd.images import ImageRecord
from etcd.records import Record
from shard.ids import ImageId, image_id, node_name
from shard.scrub import Times

LISTED_MAX = 64
"""Blocks that a record names; beyond them they are counted only."""

CLOCK_ERROR_MS = 86_400_000
"""A time that is further ahead was never. Clocks of hosts differ less, and a day is no schedule."""


@dataclass(frozen=True, slots=True, order=True)
class BadBlocks:
    """Consecutive blocks of a shard. `nodes`: whose content differs; none: rotten everywhere."""

    shard: int
    block: int
    blocks: int = 1
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Findings:
    """What a scrub has come to: blocks, and bytes of data on one node."""

    read_bytes: int = 0
    found: int = 0
    repaired: int = 0
    unrepairable: int = 0
    undecided: int = 0
    bad: tuple[BadBlocks, ...] = ()
    """Blocks that stay bad, or whose replicas differ; at most LISTED_MAX."""
    missed: tuple[str, ...] = ()
    """Nodes in sync that were away for some of it."""

    def plus(self, more: "Findings") -> "Findings":
        """Return both together: a scrub goes on where another run of it ended."""
        return Findings(
            self.read_bytes + more.read_bytes,
            self.found + more.found,
            self.repaired + more.repaired,
            self.unrepairable + more.unrepairable,
            self.undecided + more.undecided,
            tuple(sorted({*self.bad, *more.bad}))[:LISTED_MAX],
            tuple(sorted({*self.missed, *more.missed})),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScrubRecord(Record):
    """Times are milliseconds since 1970; 0: never."""

    image: ImageId
    seen_ms: int = 0
    """When a gateway first saw the image: its first scrub by schedule counts from here."""
    asked_ms: int = 0
    """When somebody last asked for a scrub."""
    stopped_ms: int = 0
    """When somebody last asked for it to end."""
    begun_ms: int = 0
    """Of the scrub under way, or the last one."""
    next_shard: int = 0
    """Shards below it are read."""
    end_shard: int = 0
    """Shards from it on are not; 0: all are."""
    missed_from: int = 0
    missed_end: int = 0
    """The shards in which a node was away, first and one behind the last; 0, 0: none."""
    shards_done: int = 0
    finished_ms: int = 0
    """Of the last one that was through."""
    now: Findings = field(default_factory=Findings)
    """Of the one under way, up to `next_shard`."""
    last: Findings = field(default_factory=Findings)
    """Of the last one that was through."""

    @property
    def key(self) -> str:
        """Return where the record stands."""
        return keys.scrub(self.image)

    @property
    def times(self) -> Times:
        """Return what was when."""
        return Times(self.seen_ms, self.asked_ms, self.stopped_ms, self.begun_ms, self.finished_ms)

    @property
    def bad(self) -> tuple[BadBlocks, ...]:
        """Return the blocks that stay bad, or differ, by the last scrub and since."""
        return tuple(sorted({*self.now.bad, *self.last.bad}))

    def set_right(self, now_ms: int) -> "ScrubRecord":
        """Return the record without times that are a day and more from now on, in their order.

        Some host's clock was ahead then. No scrub would fall due before that time.
        """
        latest_ms = max(
            self.seen_ms, self.asked_ms, self.stopped_ms, self.begun_ms, self.finished_ms
        )
        ahead_ms = latest_ms - now_ms
        if ahead_ms < CLOCK_ERROR_MS:
            return self

        def moved(time_ms: int) -> int:
            return max(1, time_ms - ahead_ms) if time_ms else 0

        return replace(
            self,
            seen_ms=moved(self.seen_ms),
            asked_ms=moved(self.asked_ms),
            stopped_ms=moved(self.stopped_ms),
            begun_ms=moved(self.begun_ms),
            finished_ms=moved(self.finished_ms),
        )

    def begin(self, now_ms: int) -> "ScrubRecord":
        """Return the record with a scrub under way: the one there is, or a new one."""
        if self.times.is_under_way and not self.times.is_asked:
            return self
        begun_ms = max(now_ms, self.asked_ms, self.stopped_ms + 1, self.finished_ms + 1)
        return replace(
            self,
            begun_ms=begun_ms,
            next_shard=0,
            end_shard=0,
            missed_from=0,
            missed_end=0,
            shards_done=0,
            now=Findings(),
        )

    def begin_missed(self, now_ms: int) -> "ScrubRecord":
        """Return the record with a scrub under way of what the last one passed over."""
        if not self.missed_end or self.times.is_under_way or self.times.is_asked:
            return self
        return replace(
            self,
            begun_ms=max(now_ms, self.finished_ms + 1, self.stopped_ms + 1),
            next_shard=self.missed_from,
            end_shard=self.missed_end,
            missed_from=0,
            missed_end=0,
            now=replace(self.last, missed=()),
        )

    def with_missed(self, shards: tuple[int, int] | None) -> "ScrubRecord":
        """Return the record with shards in which a node was away."""
        if shards is None:
            return self
        first = min(shards[0], self.missed_from) if self.missed_end else shards[0]
        return replace(self, missed_from=first, missed_end=max(shards[1], self.missed_end))

    def missed_is_back(self, image: ImageRecord, alive: Collection[str]) -> bool:
        """Whether a node that the last scrub passed over runs, and is in sync wherever it is."""
        stale = {node for nodes in image.stale.values() for node in nodes}
        return bool(self.missed_end and set(self.last.missed) & set(alive) - stale)

    def asked(self, now_ms: int) -> "ScrubRecord":
        """Return the record with a scrub asked for."""
        return replace(self, asked_ms=max(now_ms, self.begun_ms + 1, self.stopped_ms + 1))

    def stopped(self, now_ms: int) -> "ScrubRecord":
        """Return the record with its scrub ended."""
        return replace(self, stopped_ms=max(now_ms, self.begun_ms, self.asked_ms))

    def _fields(self) -> dict[str, Json]:
        return {
            "image": self.image,
            "seen_ms": self.seen_ms,
            "asked_ms": self.asked_ms,
            "stopped_ms": self.stopped_ms,
            "begun_ms": self.begun_ms,
            "next_shard": self.next_shard,
            **({"end_shard": self.end_shard} if self.end_shard else {}),
            **({"missed": [self.missed_from, self.missed_end]} if self.missed_end else {}),
            "shards_done": self.shards_done,
            "finished_ms": self.finished_ms,
            "now": _findings_json(self.now),
            "last": _findings_json(self.last),
        }

    @classmethod
    def _take(cls, fields: Fields) -> Self:
        missed_from, missed_end = _range(fields, "missed") if fields.has("missed") else (0, 0)
        return cls(
            image=fields.text("image", image_id),
            end_shard=fields.number("end_shard") if fields.has("end_shard") else 0,
            missed_from=missed_from,
            missed_end=missed_end,
            seen_ms=fields.number("seen_ms"),
            asked_ms=fields.number("asked_ms"),
            stopped_ms=fields.number("stopped_ms"),
            begun_ms=fields.number("begun_ms"),
            next_shard=fields.number("next_shard"),
            shards_done=fields.number("shards_done"),
            finished_ms=fields.number("finished_ms"),
            now=_findings(fields.within("now", fields.mapping("now"))),
            last=_findings(fields.within("last", fields.mapping("last"))),
            extra=fields.rest(),
        )


def _findings_json(findings: Findings) -> Json:
    return {
        "read_bytes": findings.read_bytes,
        "found": findings.found,
        "repaired": findings.repaired,
        "unrepairable": findings.unrepairable,
        "undecided": findings.undecided,
        "missed": list(findings.missed),
        "bad": [
            {"shard": bad.shard, "block": bad.block, "blocks": bad.blocks, "nodes": list(bad.nodes)}
            for bad in findings.bad
        ],
    }


def _findings(fields: Fields) -> Findings:
    return Findings(
        read_bytes=fields.number("read_bytes"),
        found=fields.number("found"),
        repaired=fields.number("repaired"),
        unrepairable=fields.number("unrepairable"),
        undecided=fields.number("undecided"),
        bad=tuple(_bad(fields.within("bad", item)) for item in fields.items("bad")),
        missed=_node_names(fields, "missed"),
    )


def _range(fields: Fields, name: str) -> tuple[int, int]:
    found = fields.items(name)
    if len(found) != 2 or not all(isinstance(each, int) and each >= 0 for each in found):
        fields.fail(name, "is not two numbers")
    first, end = (each for each in found if isinstance(each, int))
    return first, end


def _bad(fields: Fields) -> BadBlocks:
    return BadBlocks(
        shard=fields.number("shard"),
        block=fields.number("block"),
        blocks=fields.number("blocks", 1),
        nodes=_node_names(fields, "nodes"),
    )


def _node_names(fields: Fields, name: str) -> tuple[str, ...]:
    return fields.texts(name, fields.items(name), node_name)
