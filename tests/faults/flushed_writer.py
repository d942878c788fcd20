"""A writer that knows what it was promised, and the judgement of what is found afterwards.

The journal is kept in the test's own memory, outside the storage under test. Per block it holds
every version since the last one known to be on stable storage. A version is *answered* when its
write was, *flushed* when a flush that was sent after that answer was itself answered.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass, field

from tests.faults.nbd_session import Answer, NbdError, NbdSession
from tests.faults.stamps import DAMAGED, ZEROES

LONGEST_WRITE_BLOCKS = 16
READ_BLOCKS = 256
POLL_S = 0.2


@dataclass
class BlockHistory:
    """What may be read from one block: any content from the index `flushed` on."""

    # Contents in the order in which they were sent; a fresh image reads as zeroes.
    contents: list[int] = field(default_factory=lambda: [ZEROES])
    answered: int = 0
    flushed: int = 0

    def judge(self, found: int) -> str | None:
        """What is wrong with reading `found`, or None."""
        if found == DAMAGED:
            return "holds neither zeroes nor any version of itself"
        if found not in self.contents:
            return f"holds version {found}, which was never written there"
        if found in self.contents[self.answered :]:
            return None
        lost = "a flushed" if found not in self.contents[self.flushed :] else "an answered"
        return f"lost {lost} write: version {found} of {self.contents}"


@dataclass(frozen=True)
class _Request:
    is_flush: bool
    blocks: tuple[int, ...]
    index: tuple[int, ...]  # of each block's new content, or of what a flush makes certain


class FlushedWriter:
    """Writes stamped blocks at random places with many in flight, flushing now and then."""

    def __init__(self, blocks: int, seed: int, *, depth: int = 16, flush_every: int = 48) -> None:
        self.histories: dict[int, BlockHistory] = {}
        self.error: str | None = None
        self.flushes = 0
        self._blocks = blocks
        self._random = random.Random(seed)
        self._depth = depth
        self._flush_every = flush_every
        self._version = 0
        self._unflushed: set[int] = set()
        self._busy: set[int] = set()
        self._pending: dict[Answer, _Request] = {}

    def run(self, session: NbdSession, until: Callable[[], bool]) -> None:
        """Writes until told to stop or until the first error, which `error` then holds."""
        since_flush = 0
        while not until() and self.error is None:
            while len(self._pending) < self._depth:
                self._send_write(session)
                since_flush += 1
            if since_flush >= self._flush_every:
                self._send_flush(session)
                since_flush = 0
            self._collect(POLL_S)
        while self._pending and self.error is None:
            self._collect(POLL_S)

    def verify(self, session: NbdSession) -> list[str]:
        """Reads the whole image; returns what is wrong with it, at best nothing."""
        wrong = []
        for first in range(0, self._blocks, READ_BLOCKS):
            count = min(READ_BLOCKS, self._blocks - first)
            for block, found in enumerate(session.call("read", first, count), start=first):
                verdict = self.histories.get(block, BlockHistory()).judge(found)
                if verdict is not None:
                    wrong.append(f"block {block} {verdict}")
        return wrong

    def _send_write(self, session: NbdSession) -> None:
        blocks = self._free_blocks()
        if not blocks:
            return
        self._version += 1
        op = self._random.choices(["write", "zero", "trim"], [90, 5, 5])[0]
        index = []
        for block in blocks:
            history = self.histories.setdefault(block, BlockHistory())
            history.contents.append(self._version if op == "write" else ZEROES)
            index.append(len(history.contents) - 1)
        self._busy.update(blocks)
        answer = session.submit(op, blocks[0], len(blocks), self._version)
        self._pending[answer] = _Request(False, blocks, tuple(index))

    def _free_blocks(self) -> tuple[int, ...]:
        # One write at a time to a block: its versions then have one order, known here.
        first = self._random.randrange(self._blocks)
        length = min(self._random.randint(1, LONGEST_WRITE_BLOCKS), self._blocks - first)
        blocks = range(first, first + length)
        return () if self._busy.intersection(blocks) else tuple(blocks)

    def _send_flush(self, session: NbdSession) -> None:
        covered = tuple(sorted(self._unflushed))
        answered = tuple(self.histories[block].answered for block in covered)
        self._unflushed.clear()
        self._pending[session.submit("flush")] = _Request(True, covered, answered)

    def _collect(self, timeout_s: float) -> None:
        done, _ = wait(self._pending, timeout=timeout_s, return_when=FIRST_COMPLETED)
        for answer in done:
            request = self._pending.pop(answer)
            failed = answer.exception()
            if failed is not None:
                if not isinstance(failed, NbdError):
                    raise failed
                self.error = self.error or str(failed)
            elif request.is_flush:
                self._flushed(request)
            else:
                self._answered(request)

    def _answered(self, request: _Request) -> None:
        for block, index in zip(request.blocks, request.index, strict=True):
            self.histories[block].answered = index
        self._busy.difference_update(request.blocks)
        self._unflushed.update(request.blocks)

    def _flushed(self, request: _Request) -> None:
        self.flushes += 1
        for block, index in zip(request.blocks, request.index, strict=True):
            history = self.histories[block]
            history.flushed = max(history.flushed, index)
