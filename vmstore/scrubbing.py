"""Scrubs: which image this gateway reads through next, how far it is, and what rot was found.

`RotLog` hears of the engine's findings where those are decided upon, `Scrubber` looks now and then
from a thread that may wait for etcd. A scrub is made by the holder of an image; one that nobody has
open is taken with a lease for maintenance, which yields to whoever wants it for a client. How far
it is stands in etcd, so that whoever is the next holder goes on from there.
"""

import random
import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import structlog

from etcd import keys
from etcd.errors import EtcdError
from etcd.images import ImageRecord
from etcd.interface import Notice
from etcd.records import LeaseRecord
from etcd.scrubs import BadBlocks, Findings, ScrubRecord
from shard.ids import ImageId
from shard.scrub import Due, ScrubLimits, due
from vmstore.catalog import Catalog, ImageEntry
from vmstore.errors import RecordChanged
from vmstore.names import ImageName
from vmstore.stored import Stored

log = structlog.get_logger()

AT_ONCE = 1
"""Images that one gateway scrubs at the same time: the rate is that of one."""

NOTICED_S = (0.1, 0.6)
POLL_S = (20.0, 40.0)
"""See `Caretaker`: between a notice and a look, and between looks without one."""

BUSY_S = 1.0
"""Between looks while a scrub is under way."""

SAVE_S = 10.0
"""Between two savings of how far a scrub is: so much is read again after a restart."""

OPEN_S = 30.0
"""How long an image may take to open for its scrub."""

AGAIN_S = 30.0
"""Until a scrub that ended early is gone on with: what ended it may last."""


class Images(Protocol):
    """What a scrubber has of the gateway's open images. All for any thread."""

    def serving(self) -> Mapping[ImageId, ImageName]:
        """Return the images that serve here."""

    def maintain(self, name: ImageName, *, scrub: bool = False) -> None:
        """Open an image that nobody has open."""

    def scrub(
        self, image: ImageId, attempt: int, shards: tuple[int, int], limits: ScrubLimits
    ) -> None:
        """Begin a scrub of an image that serves: of shards from one on, up to another (0: all)."""

    def end_scrub(self, image: ImageId, attempt: int) -> None:
        """End it."""

    def scrubbed(self, image: ImageId) -> None:
        """An image that was opened for its scrub is no longer needed."""


ANCESTOR_MS = 24 * 3600 * 1000
"""Between two scrubs of an image that a gateway asks for because a clone met damage in it."""


@dataclass(frozen=True, slots=True)
class Report:
    """How far a scrub came; `why` it ended early, or empty."""

    attempt: int
    next_shard: int
    shards_done: int
    findings: Findings
    why: str = ""
    missed_shards: tuple[int, int] | None = None
    """In which a node was away: the first, and one behind the last."""


def report_of(state: Mapping[str, Any], bad: Collection[BadBlocks], why: str = "") -> Report:
    """Return what the engine says of a scrub."""
    findings = Findings(
        read_bytes=state["read_bytes"],
        found=state["found"],
        repaired=state["repaired"],
        unrepairable=state["given_up"],
        undecided=state["undecided"],
        missed=tuple(state["missed"]),
    )
    return Report(
        state["attempt"],
        state["next_shard"],
        state["shards_done"],
        findings.plus(Findings(bad=tuple(bad))),
        why,
        state["missed_shards"],
    )


class RotLog:
    """What was found rotten in the images of one gateway. One thread writes, any may read."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()
        self._bad: dict[ImageId, set[BadBlocks]] = {}
        self._ended: dict[ImageId, Report] = {}
        self._ancestors: set[ImageId] = set()
        """Images in which clones of theirs met damage."""
        self.news = threading.Event()

    def on_event(
        self, image: ImageId, name: str, event: Mapping[str, Any], nodes: Sequence[str]
    ) -> bool:
        """Take an event of the engine; False: it is of something else."""
        node = nodes[event["node"]] if "node" in event else ""
        where = {"image": name, "node": node, "shard": event.get("shard")}
        match event["event"]:
            case "bad_block":
                what = "valid checksum, other content" if event["hidden"] else "checksum"
                log.error("bitrot_found", **where, block=event["block"], blocks=event["blocks"],
                          what=what)  # fmt: skip
                self._count(name, "found", event["blocks"])
            case "parent_rot":
                log.error("ancestor_rots", **where, block=event["block"], ancestor=event["image"])
                with self._lock:
                    self._ancestors.add(ImageId(event["image"]))
                self.news.set()
            case "repaired":
                log.warning("bitrot_repaired", **where, block=event["block"],
                            blocks=event["blocks"])  # fmt: skip
                self._count(name, "repaired", event["blocks"])
            case "metadata_repaired":
                log.error("bitrot_found", **where, block=None, blocks=0, what="metadata")
                log.warning("bitrot_repaired", **where, block=None, blocks=0)
                self._count(name, "found", 1)
                self._count(name, "repaired", 1)
            case "unrepairable":
                log.error("bitrot_unrepairable", image=name, shard=event["shard"],
                          block=event["block"])  # fmt: skip
                self._count(name, "unrepairable", 1)
                self._note(image, BadBlocks(event["shard"], event["block"]))
            case "undecided":
                differing = tuple(nodes[index] for index in event["nodes"])
                log.error("replicas_differ", image=name, shard=event["shard"],
                          block=event["block"], blocks=event["blocks"],
                          nodes=differing)  # fmt: skip
                self._count(name, "undecided", event["blocks"])
                blocks = BadBlocks(event["shard"], event["block"], event["blocks"], differing)
                self._note(image, blocks)
            case "scrub_ended":
                log.info("scrub_ended", image=name, why=event["status"], **event["report"])
                report = report_of(event["report"], (), event["status"] or "")
                with self._lock:
                    self._ended[image] = report
                self.news.set()
            case _:
                return False
        return True

    def counts(self) -> Mapping[tuple[str, str], int]:
        """Return blocks by (image's name, what became of them)."""
        with self._lock:
            return dict(self._counts)

    def take_ended(self, image: ImageId) -> Report | None:
        """Return the report of a scrub that has ended, once."""
        with self._lock:
            return self._ended.pop(image, None)

    def take_bad(self) -> Mapping[ImageId, Collection[BadBlocks]]:
        """Return blocks that stay bad, or differ, by image; each once."""
        with self._lock:
            taken, self._bad = self._bad, {}
        return taken

    def give_back(self, image: ImageId, bad: Collection[BadBlocks]) -> None:
        """Keep what could not be saved."""
        with self._lock:
            self._bad.setdefault(image, set()).update(bad)

    def ancestors(self) -> list[ImageId]:
        """Return the images in which clones met damage, and that were not asked to be scrubbed."""
        with self._lock:
            return sorted(self._ancestors)

    def asked_for(self, image: ImageId) -> None:
        """Forget one of these."""
        with self._lock:
            self._ancestors.discard(image)

    def _count(self, name: str, what: str, blocks: int) -> None:
        with self._lock:
            self._counts[name, what] += blocks

    def _note(self, image: ImageId, blocks: BadBlocks) -> None:
        with self._lock:
            self._bad.setdefault(image, set()).add(blocks)
        self.news.set()


@dataclass(slots=True)
class _Run:
    """A scrub that this gateway is at."""

    image: ImageId
    name: ImageName
    attempt: int
    begun: ScrubRecord
    """As it was when this gateway began."""
    since_s: float
    started: bool = False
    """The engine is at it."""
    ending: bool = False
    saved_s: float = 0.0
    report: Report | None = None
    bad: set[BadBlocks] = field(default_factory=set)


def may_be_opened(
    record: ImageRecord, leases: Mapping[ImageId, LeaseRecord], alive: Collection[str]
) -> bool:
    """Whether an image that nobody has open can be scrubbed: all its nodes in sync run, and none
    waits for a heal, which goes first."""
    stale = {node for nodes in record.stale.values() for node in nodes}
    in_sync = record.membership.all_in_sync()
    return record.id not in leases and in_sync <= set(alive) and not stale & set(alive)


class Scrubber:
    """Has the images of a cluster scrubbed, as far as one gateway is concerned.

    `look` is called by one thread. `progress` gives what the engine says of a scrub under way.
    """

    def __init__(
        self,
        catalog: Catalog,
        images: Images,
        rot: RotLog,
        progress: Callable[[ImageId], Mapping[str, Any] | None],
        limits: ScrubLimits,
        chance: random.Random,
    ) -> None:
        self._catalog = catalog
        self._images = images
        self._rot = rot
        self._progress = progress
        self._limits = limits
        self._chance = chance
        self._noticed = threading.Event()
        self._due_s = 0.0
        self._runs: dict[ImageId, _Run] = {}
        self._attempts = 0
        self._asked_ms: dict[ImageId, int] = {}
        """When ancestors of clones were asked to be scrubbed."""
        self._not_before_s: dict[ImageId, float] = {}
        self._known: Mapping[str, ScrubRecord] = {}

    def known(self) -> Mapping[str, ScrubRecord]:
        """Return how the scrubs of all images stood when it was looked, by name. Any thread."""
        return self._known

    def watch(self) -> None:
        """Be told by etcd when somebody asks for a scrub or an image is closed."""
        self._catalog.etcd.watch(keys.SCRUBS, self._on_notice)
        self._catalog.etcd.watch(keys.LEASES, self._on_notice)

    def _on_notice(self, _notice: Notice) -> None:
        self._noticed.set()

    def under_way(self) -> Sequence[ImageId]:
        """Return the images that this gateway is at."""
        return tuple(self._runs)

    def look(self, now_s: float, now_ms: int) -> None:
        """Do what is due. `now_s` is on a clock that only grows, `now_ms` since 1970."""
        if self._noticed.is_set() or self._rot.news.is_set():
            self._noticed.clear()
            self._rot.news.clear()
            self._due_s = min(self._due_s, now_s + self._chance.uniform(*NOTICED_S))
        if now_s < self._due_s:
            return
        busy = BUSY_S if self._runs else None
        self._due_s = now_s + (busy or self._chance.uniform(*POLL_S))
        try:
            self._look(now_s, now_ms)
        except (EtcdError, RecordChanged) as error:
            log.warning("scrubber_waits", why=str(error))

    def _look(self, now_s: float, now_ms: int) -> None:
        records = self._catalog.scrubs()
        entries = {entry.image.record.id: entry for entry in self._catalog.images()}
        for image in records.keys() - entries.keys():
            self._catalog.forget_scrub(records.pop(image))
        self._known = {str(entries[image].name): found.record for image, found in records.items()}
        self._save_bad()
        self._ask_for_ancestors(now_ms)
        for run in list(self._runs.values()):
            self._go_on(run, records.get(run.image), now_s, now_ms)
        if len(self._runs) < AT_ONCE:
            self._begin(records, entries, now_s, now_ms)

    # What is due

    def _begin(
        self,
        records: Mapping[ImageId, Stored[ScrubRecord]],
        entries: Mapping[ImageId, ImageEntry],
        now_s: float,
        now_ms: int,
    ) -> None:
        found: list[tuple[Due, int, ImageId]] = []
        missed = any(stored.record.missed_end for stored in records.values())
        running = self._catalog.alive().keys() if missed else ()
        for image in entries:
            known = records.get(image)
            if known is None:
                if self._limits.every_s:
                    self._catalog.change_scrub(image, lambda r: replace(r, seen_ms=now_ms))
                continue
            if known.record.set_right(now_ms) != known.record:
                self._catalog.change_scrub(image, lambda record: record.set_right(now_ms))
                continue
            back = known.record.missed_is_back(entries[image].image.record, running)
            why = due(known.record.times, self._limits, now_ms, missed_is_back=back)
            if why is not None and self._not_before_s.get(image, now_s) <= now_s:
                found.append((why, known.record.finished_ms, image))
        if not found:
            return
        serving = self._images.serving()
        leases, alive = self._catalog.leases(), self._catalog.alive().keys()
        for why, _, image in sorted(found):
            here = image in serving
            if here or may_be_opened(entries[image].image.record, leases, alive):
                self._run(entries[image], why, here, now_s, now_ms)
                return

    def _run(self, entry: ImageEntry, why: Due, here: bool, now_s: float, now_ms: int) -> None:
        image = entry.image.record.id
        if not here:
            # The next try leaves others time, whatever becomes of this one.
            self._not_before_s[image] = now_s + AGAIN_S

        def begin(record: ScrubRecord) -> ScrubRecord:
            return record.begin_missed(now_ms) if why is Due.MISSED else record.begin(now_ms)

        begun = self._catalog.change_scrub(image, begin)
        self._attempts += 1
        self._runs[image] = _Run(image, entry.name, self._attempts, begun, now_s, saved_s=now_s)
        self._rot.take_ended(image)
        self._due_s = now_s + NOTICED_S[0]
        if not here:
            self._images.maintain(entry.name, scrub=True)

    # What is under way

    def _go_on(
        self, run: _Run, known: Stored[ScrubRecord] | None, now_s: float, now_ms: int
    ) -> None:
        serves = run.image in self._images.serving()
        if not run.started:
            if serves:
                run.started = True
                log.info("scrub_begins", image=str(run.name), from_shard=run.begun.next_shard)
                shards = (run.begun.next_shard, run.begun.end_shard)
                self._images.scrub(run.image, run.attempt, shards, self._limits)
            elif now_s - run.since_s > OPEN_S:
                self._over(run, now_s)
            return
        ended = self._rot.take_ended(run.image)
        if ended is not None and ended.attempt == run.attempt:
            self._ended(run, ended, now_s, now_ms)
            return
        state = self._progress(run.image)
        if state is not None and state["attempt"] == run.attempt:
            run.report = report_of(state, ())
        elif not serves:
            # Lost to somebody else, without a word: from where it was last heard of.
            report = run.report or Report(run.attempt, run.begun.next_shard, 0, Findings())
            self._ended(run, replace(report, why="the image is no longer here"), now_s, now_ms)
            return
        if known is not None and known.record.stopped_ms > run.begun.begun_ms and not run.ending:
            run.ending = True
            self._images.end_scrub(run.image, run.attempt)
        if run.report is not None and now_s - run.saved_s >= SAVE_S:
            run.saved_s = now_s
            self._save(run, run.report, 0)

    def _ended(self, run: _Run, report: Report, now_s: float, now_ms: int) -> None:
        try:
            self._save(run, report, 0 if report.why else now_ms)
        finally:
            self._over(run, now_s)

    def _over(self, run: _Run, now_s: float) -> None:
        del self._runs[run.image]
        self._not_before_s[run.image] = now_s + AGAIN_S
        self._images.scrubbed(run.image)
        self._due_s = now_s + BUSY_S

    def _save(self, run: _Run, report: Report, finished_ms: int) -> None:
        def change(record: ScrubRecord) -> ScrubRecord:
            if record.begun_ms != run.begun.begun_ms or not record.times.is_under_way:
                # Stopped meanwhile, and perhaps begun anew.
                return record
            now = run.begun.now.plus(report.findings).plus(Findings(bad=tuple(record.now.bad)))
            done = run.begun.shards_done + report.shards_done
            record = replace(record, now=now, next_shard=report.next_shard, shards_done=done)
            record = record.with_missed(report.missed_shards)
            if finished_ms:
                record = replace(record, finished_ms=max(finished_ms, record.begun_ms), last=now)
            return record

        self._catalog.change_scrub(run.image, change)

    def _ask_for_ancestors(self, now_ms: int) -> None:
        """Have images scrubbed in which a clone met damage: they repair it, the clone does not."""
        for image in self._rot.ancestors():
            # What no scrub can repair is met again and again.
            if now_ms - self._asked_ms.get(image, -ANCESTOR_MS) >= ANCESTOR_MS:
                self._catalog.ask_for_scrub(image, now_ms)
                self._asked_ms[image] = now_ms
            self._rot.asked_for(image)

    def _save_bad(self) -> None:
        """Note what stays bad, whoever found it, for people to see when the image is closed."""
        left = dict(self._rot.take_bad())
        try:
            for image, bad in list(left.items()):
                self._catalog.change_scrub(image, partial(_with_bad, tuple(bad)))
                del left[image]
        finally:
            for image, bad in left.items():
                self._rot.give_back(image, bad)


def _with_bad(bad: tuple[BadBlocks, ...], record: ScrubRecord) -> ScrubRecord:
    return replace(record, now=record.now.plus(Findings(bad=bad)))
