"""`Voting`: answers what holders ask, from the record and by the vote rule.

Each answer is durable before it is given. One image at a time is judged; different images do not
wait for each other's disk syncs. Nothing here needs etcd: what etcd knows arrives with the request.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

import structlog

from arbiter.errors import ArbiterError, ArbiterFailed
from arbiter.exchange import Addressee, Reply, Verdict
from arbiter.record import ImageVotes, Record
from arbiter.statement import Statement, Votes, confirm_image, prepare_image
from arbiter.vote import Answer
from shard.ids import ImageId

log = structlog.get_logger()

LOCKS = 64
"""Images judged at once, at most; which share a lock is chance."""

DROPPED_MAX = 4096
"""Images dropped last that are refused: a request that was under way as one of them was deleted
comes within seconds."""


class Voting:
    """The votes of one arbiter. Safe to use from several threads."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._locks = [threading.Lock() for _ in range(LOCKS)]
        self._counting = threading.Lock()
        self._counters = dict.fromkeys(Verdict, 0)
        self._dropped: dict[ImageId, None] = {}

    def prepare(self, to: Addressee, image: ImageId, known: Statement, wanted: Statement) -> Reply:
        """Grant `wanted`, which follows `known`; see `arbiter.statement.prepare_image`."""
        return self._vote(to, image, lambda votes: prepare_image(votes, known, wanted))

    def confirm(self, to: Addressee, image: ImageId, stated: Statement) -> Reply:
        """Take `stated` for confirmed."""
        return self._vote(to, image, lambda votes: confirm_image(votes, stated))

    def drop(self, image: ImageId) -> bool:
        """Forget an image that was deleted; return whether it was known. Raises ArbiterFailed.

        It is not voted on again: nobody would ever have the votes dropped that a late request left.
        """
        with self._counting:
            self._dropped[image] = None
            if len(self._dropped) > DROPPED_MAX:
                del self._dropped[next(iter(self._dropped))]
        with self._lock_of(image):
            return self._record.drop(image)

    def known(self) -> Iterator[tuple[ImageId, Votes]]:
        """Yield the votes of all images; damaged ones are left out."""
        for image in self._record.images():
            with suppress(ArbiterError):
                votes = self._record.read(image).votes
                if votes:
                    yield image, votes

    def counters(self) -> dict[str, int]:
        """Return how many requests ended how."""
        with self._counting:
            return {verdict.value: count for verdict, count in self._counters.items()}

    def _vote(
        self, to: Addressee, image: ImageId, judge: Callable[[Votes], tuple[Votes, Answer]]
    ) -> Reply:
        with self._lock_of(image):
            try:
                reply = self._judged(to, image, judge)
            except ArbiterFailed as error:
                reply = Reply(Verdict.FAILED, detail=error.detail)
            except ArbiterError as error:
                reply = Reply(Verdict.FAILED, detail=str(error))
        with self._counting:
            self._counters[reply.verdict] += 1
        if reply.verdict is not Verdict.GRANTED:
            why = reply.refusal.value if reply.refusal is not None else reply.detail
            log.warning("vote_refused", image=image, verdict=reply.verdict.value, why=why)
        return reply

    def _judged(
        self, to: Addressee, image: ImageId, judge: Callable[[Votes], tuple[Votes, Answer]]
    ) -> Reply:
        own = self._record.identity
        if to.arbiter != own.id:
            detail = f"this is arbiter {own.name} of cluster {own.cluster} with id {own.id}"
            return Reply(Verdict.OTHER_ARBITER, detail=detail)
        if to.start_counter > own.start_counter:
            detail = f"this is its start {own.start_counter}, start {to.start_counter} was seen"
            return Reply(Verdict.BEHIND, detail=detail)
        with self._counting:
            if image in self._dropped:
                return Reply(Verdict.FAILED, detail=f"image {image} was deleted")
        before = self._record.read(image)
        if to.changes > before.changes:
            detail = f"it has {before.changes} changes of image {image}, {to.changes} were seen"
            return Reply(Verdict.BEHIND, changes=before.changes, detail=detail)
        votes, refusal = judge(before.votes)
        if refusal is not None:
            return Reply(Verdict.REFUSED, changes=before.changes, refusal=refusal)
        if votes == before.votes:
            return Reply(Verdict.GRANTED, changes=before.changes)
        after = ImageVotes(before.changes + 1, votes)
        self._record.store(image, after)
        return Reply(Verdict.GRANTED, changes=after.changes)

    def _lock_of(self, image: ImageId) -> threading.Lock:
        return self._locks[int(image[:8], 16) % LOCKS]
