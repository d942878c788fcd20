"""What reads may return, sector by sector: the last answered write or one in flight, never older.

    a write is     known to be there                        known to be gone
    in flight      once a read has returned it              never
    answered       yes, unless all who held it lost power   when a later one is known to be there
    an orphan      once a read has returned it              as answered ones

An orphan's gateway has ended; it has happened or never will when the next holder serves.

A write supersedes another where it began after the other had ended, or where a read returned it
when the other had ended. A power cut of the last in-sync node that remembers puts every write that
was not flushed in doubt: it may be gone, and what it superseded may be back, until a read tells. So
it does with one whose answer was on its way. The flush that was to make such a write durable fails;
one that does not says that it is there.

A rollback supersedes whatever was written before, be it in doubt; what it puts in place is durable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

SECTOR_BYTES = 512
TORN = (1 << 64) - 1
NOTHING = -1
"""The stamp of what only says that all before it is gone: no sector reads as it."""
PRUNED_FROM = 8
"""Fewer writes of a sector than this are kept, whether they are over or not."""
UNDER_WAY_S = 0.01
"""So long after a node's end an answer of its may still arrive, of what is gone; on a slow path
longer (`under_way_s`)."""


class Violation(AssertionError):
    """An invariant does not hold."""


@dataclass(slots=True, eq=False)
class Written:
    """One write, as one sector knows it."""

    sector: int
    stamp: int
    begun: float
    epoch: int
    wide: bool = False
    """One of several parts of its request, which go to shards of their own."""
    ended: float | None = None
    """Answered, or settled as an orphan."""
    known: float = float("inf")
    """Since when it is known to be there: answered, or seen by a read."""
    answered: bool = False
    sure: bool = False
    """It is, or was, surely there: answered, or seen by a read."""
    durable: bool = False
    shaken: bool = False
    """Memory was lost while it was in flight, when part of it may have been all done."""
    lost: float = float("-inf")
    """When its last memory went, if it was not durable: a read from before tells nothing since."""
    gone: bool = False
    """A read found what it had superseded."""
    superseded_by: list[Written] = field(default_factory=list)


@dataclass(slots=True)
class _Change:
    sectors: range
    entries: list[Written]


class Oracle:
    """All that guests did to one image."""

    def __init__(self, shard_sectors: int) -> None:
        self._sectors: dict[int, list[Written]] = {}
        self._shard_sectors = shard_sectors
        self._open: dict[int, _Change] = {}
        self._unflushed: dict[int, Written] = {}
        """By their `id`."""
        self._forgotten: list[Written] = []
        """Answered and not flushed when the last memory of them went; no flush has failed since."""
        self._loss_untold = False
        self._lost_s = float("-inf")
        self._told_s = float("-inf")
        self.losses_told = 0
        self._reading: dict[int, float] = {}
        self.reads = 0
        self.under_way_s = UNDER_WAY_S
        self._unnoticed: set[str] = set()
        """Nodes that have lost their power, while the holder still takes them for alive."""

    def _history(self, sector: int) -> list[Written]:
        found = self._sectors.get(sector)
        if found is None:
            found = self._sectors[sector] = [_nothing(sector)]
        return found

    def begin(self, token: int, first: int, count: int, stamp: int, epoch: int, now: float) -> None:
        """A write (or zeroing: stamp 0) is sent."""
        change = _Change(range(first, first + count), [])
        wide = first // self._shard_sectors != (first + count - 1) // self._shard_sectors
        for sector in change.sectors:
            entry = Written(sector, stamp, now, epoch, wide)
            self._history(sector).append(entry)
            change.entries.append(entry)
        self._open[token] = change

    def answered(self, token: int, now: float, *, durable: bool) -> None:
        """It is answered."""
        change = self._open.pop(token)
        for sector, entry in zip(change.sectors, change.entries, strict=True):
            entry.ended = now if entry.ended is None else entry.ended
            entry.known = min(entry.known, now)
            # It may rest on what a node said that has lost it since, unnoticed.
            unnoticed = bool(self._unnoticed) and entry.lost > entry.begun
            under_way = unnoticed or now - entry.lost < self.under_way_s
            entry.answered, entry.sure = True, durable or not (entry.shaken or under_way)
            if durable:
                entry.durable = True
            elif entry.sure:
                self._unflushed[id(entry)] = entry
            self._supersede(sector, entry)

    def _supersede(self, sector: int, newer: Written) -> None:
        """Note what a write that is surely there has replaced."""
        for older in self._sectors[sector]:
            ended = older.ended is not None and older.ended < newer.begun
            if older is not newer and ended and newer not in older.superseded_by:
                older.superseded_by.append(newer)
        self._prune(sector)

    def _prune(self, sector: int) -> None:
        """Forget what no read, of those under way or to come, may return."""
        history = self._sectors[sector]
        if len(history) < PRUNED_FROM:
            return
        oldest_read = min(self._reading.values(), default=float("inf"))

        def is_over(entry: Written) -> bool:
            return any(n.durable and n.sure and n.known < oldest_read for n in entry.superseded_by)

        self._sectors[sector] = [entry for entry in history if not is_over(entry)]

    def read_begins(self, token: int, now: float) -> None:
        """A read is sent."""
        self._reading[token] = now

    def read_ends(self, token: int) -> None:
        """It is answered and judged, or never will be."""
        self._reading.pop(token, None)

    def orphan(self, token: int) -> None:
        """Its sender will never hear of it; `settle` ends it."""
        # It stays in the sectors' histories as in flight.
        self._open.pop(token, None)

    def power_lost(self, node: str) -> None:
        """A node has lost its power; whoever waits for nothing from it learns that later."""
        self._unnoticed.add(node)

    def noticed(self, node: str) -> None:
        """The holder knows that a node is gone."""
        self._unnoticed.discard(node)

    def settle(self, epoch: int, now: float) -> None:
        """A holder of this epoch serves: what earlier ones sent has happened, or never will."""
        self._unnoticed.clear()
        self._forgotten = [entry for entry in self._forgotten if entry.epoch >= epoch]
        for history in self._sectors.values():
            for entry in history:
                if entry.ended is None and entry.epoch < epoch:
                    entry.ended = now

    def flush_begins(self) -> list[Written]:
        """Return what a flush that is sent now covers."""
        return [*self._unflushed.values(), *self._forgotten]

    def flush_failed(self, covered: list[Written], begun: float, now: float) -> None:
        """It says that answered writes may be gone. Raises Violation if nobody lost any memory."""
        if not self._loss_untold and begun > self._told_s:
            raise Violation("a flush failed, and nobody had lost what it covers")
        if begun > self._lost_s:
            # It covers all that was lost; one that was on its way may not have.
            self._loss_untold = False
        self._told_s = now
        self.losses_told += 1
        told = set(map(id, covered))
        self._forgotten = [entry for entry in self._forgotten if id(entry) not in told]

    def flushed(self, covered: list[Written], now: float) -> None:
        """It is answered. Raises Violation where what it covers is known to be gone."""
        promised = {id(entry) for entry in self._forgotten}
        for entry in covered:
            if id(entry) in promised:
                if entry.gone:
                    raise Violation(
                        f"a flush was answered, but sector {entry.sector} has lost {_told(entry)}"
                    )
                entry.sure, entry.known = True, min(entry.known, now)
                self._supersede(entry.sector, entry)
            if entry.sure:
                entry.durable = True
        self._forgotten = [entry for entry in self._forgotten if not entry.durable]
        for entry in covered:
            self._unflushed.pop(id(entry), None)
        for sector in {entry.sector for entry in covered}:
            self._prune(sector)

    def memory_lost(
        self, concerns: Callable[[int], bool], now: float, *, is_told: bool = True
    ) -> None:
        """The last in-sync node that remembered these sectors has lost its power.

        A flush has to say so, where `is_told`; else one may.
        """
        for sector, history in self._sectors.items():
            if concerns(sector):
                for entry in history:
                    entry.sure &= entry.durable
                    if not entry.durable:
                        entry.lost = now
                    entry.shaken |= entry.ended is None and entry.wide
        self._loss_untold, self._lost_s = True, now
        known = {id(entry) for entry in self._forgotten}
        lost = [e for e in self._unflushed.values() if not e.sure and e.answered]
        if is_told:
            self._forgotten += [entry for entry in lost if id(entry) not in known]
        self._unflushed = {key: entry for key, entry in self._unflushed.items() if entry.sure}

    def rolled_back(self, contents: Mapping[int, frozenset[int]], epoch: int, now: float) -> None:
        """The image holds what a snapshot did: of each sector one of these stamps.

        No client has it, and nobody of a former epoch changes it any more.
        """
        self._unnoticed.clear()
        self._unflushed.clear()
        self._forgotten.clear()

        def put_back(sector: int, stamp: int, *, sure: bool) -> Written:
            return Written(
                sector, stamp, now, epoch, ended=now, known=now, answered=True, sure=sure,
                durable=True,
            )  # fmt: skip

        for sector, stamps in contents.items():
            history = self._history(sector)
            end = put_back(sector, NOTHING, sure=True)
            for older in history:
                older.ended = now if older.ended is None else older.ended
                older.superseded_by.append(end)
            history.append(end)
            history += [put_back(sector, each, sure=len(stamps) == 1) for each in sorted(stamps)]

    def at_rest(self, sector: int, epoch: int, now: float) -> frozenset[int]:
        """Return what a sector may hold while nothing is under way at the holder of an epoch.

        No write that it has not answered counts, but for those whose sender is gone. One of an
        earlier holder may have come to the nodes, though that one stands still.
        """
        asked = {
            id(entry)
            for change in self._open.values()
            for entry in change.entries
            if entry.epoch == epoch
        }
        return frozenset(
            entry.stamp
            for entry in self._history(sector)
            if id(entry) not in asked and not self._is_gone(entry, now) and entry.stamp != NOTHING
        )

    def check_read(self, first: int, stamps: list[int], begun: float, now: float) -> None:
        """Judge what a read returned. Raises Violation."""
        self.reads += 1
        for sector, stamp in enumerate(stamps, first):
            history = self._history(sector)
            if len(history) == 1 and history[0].stamp == stamp:
                continue
            same = [w for w in history if w.stamp == stamp and w.begun <= now]
            possible = [w for w in same if not self._is_gone(w, begun)]
            if not possible:
                what = "a mixture" if stamp == TORN else f"{stamp:x}"
                raise Violation(
                    f"sector {sector} read as {what} from {begun:.4f} to {now:.4f}; "
                    f"its history: {[_told(w) for w in history]}"
                )
            if len(possible) == 1:
                self._seen(sector, possible[0], begun, now)

    def _is_gone(self, entry: Written, begun: float) -> bool:
        """Whether a write that is surely there, from before the read, has replaced it."""
        return any(newer.sure and newer.known < begun for newer in entry.superseded_by)

    def _seen(self, sector: int, entry: Written, begun: float, now: float) -> None:
        if begun <= entry.lost:
            return
        entry.sure = True
        entry.known = min(entry.known, now)
        if not entry.durable:
            self._unflushed.setdefault(id(entry), entry)
        for other in self._sectors[sector]:
            if other is entry or other.ended is None or other.ended >= begun:
                continue
            # It had ended before the read, which did not return it: it is not there any more.
            other.gone |= other in entry.superseded_by
            if other in entry.superseded_by:
                entry.superseded_by.remove(other)
            if entry not in other.superseded_by:
                other.superseded_by.append(entry)
        self._prune(sector)


def _nothing(sector: int) -> Written:
    """Return what a new image holds."""
    return Written(
        sector, 0, -1.0, 0, ended=-1.0, known=-1.0, answered=True, sure=True, durable=True
    )


def _told(entry: Written) -> str:
    state = "answered" if entry.answered else "in flight" if entry.ended is None else "orphan"
    flags = (" sure" if entry.sure else " in doubt") + (" durable" if entry.durable else "")
    ended = "" if entry.ended is None else f"-{entry.ended:.4f}"
    return f"{entry.stamp:x} {state} {entry.begun:.4f}{ended} epoch {entry.epoch}{flags}"
