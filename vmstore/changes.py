"""Which parts of an image were written since a snapshot of it, from what its nodes know of blocks.

No content is read. A gateway is asked in two rounds: which parts of the whole were written, which
it answers by looking only where there is something; then what is there now, in the shards of these.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vmstore.names import ImageName, SnapshotName
from vmstore.nbd_client import BASE_ALLOCATION, DIRTY_BITMAP, STATE_DIRTY, STATE_ZERO, NbdClient

ASKED_BYTES = 1 << 30
"""Most bytes of one question in the second round: no more are looked into one by one."""


@dataclass(frozen=True, slots=True)
class Changed:
    """A part that was written; whole blocks, but for the image's end."""

    offset_bytes: int
    length_bytes: int
    zero: bool
    """It reads as zeroes, and no content is kept for it."""


def since(
    path: Path,
    name: ImageName | SnapshotName,
    snapshot: str,
    shard_bytes: int,
    progress: Callable[[float], None] = lambda _done: None,
) -> Iterator[Changed]:
    """Yield what was written since a snapshot, in order, neighbours joined.

    `path` is the socket of a gateway that has the image, or may open it. What is written meanwhile
    may be among it. Raises NbdFailed, also where the snapshot is removed meanwhile.
    """
    bitmap = DIRTY_BITMAP + snapshot
    with (
        NbdClient(path, str(name), [bitmap]) as wide,
        NbdClient(path, str(name), [BASE_ALLOCATION, bitmap]) as close,
    ):
        size_bytes = min(wide.size_bytes, close.size_bytes)
        dirty = _where(wide, bitmap, size_bytes)
        found = _looked_into(close, bitmap, _asked(dirty, shard_bytes, size_bytes), progress)
        yield from joined(found)
    progress(1.0)


def _where(client: NbdClient, bitmap: str, size_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield begin and end of each part that was written."""
    at = 0
    while at < size_bytes:
        for length, flags in client.status(at, size_bytes - at)[bitmap]:
            if flags & STATE_DIRTY:
                yield at, at + length
            at += length


def _asked(
    parts: Iterable[tuple[int, int]], shard_bytes: int, size_bytes: int
) -> Iterator[tuple[int, int]]:
    """Yield begin and end of the questions that cover the shards of these, each once."""
    begin = end = 0
    for first, last in parts:
        low = first - first % shard_bytes
        high = min(-(-last // shard_bytes) * shard_bytes, size_bytes)
        if low > end:
            yield from _cut(begin, end)
            begin, end = low, high
        else:
            end = max(end, high)
    yield from _cut(begin, end)


def _cut(begin: int, end: int) -> Iterator[tuple[int, int]]:
    for at in range(begin, end, ASKED_BYTES):
        yield at, min(at + ASKED_BYTES, end)


def _looked_into(
    client: NbdClient,
    bitmap: str,
    questions: Iterable[tuple[int, int]],
    progress: Callable[[float], None],
) -> Iterator[Changed]:
    for begin, end in questions:
        at = begin
        while at < end:
            found = client.status(at, end - at)
            for length, dirty, zero in _side_by_side(found[bitmap], found[BASE_ALLOCATION]):
                if dirty & STATE_DIRTY:
                    yield Changed(at, length, bool(zero & STATE_ZERO))
                at += length
        progress(end / client.size_bytes)


def _side_by_side(
    dirty: list[tuple[int, int]], allocated: list[tuple[int, int]]
) -> Iterator[tuple[int, int, int]]:
    """Yield (length, flags of the one, flags of the other), as far as both reach."""
    ones, others = iter(dirty), iter(allocated)
    one, other = next(ones), next(others)
    while True:
        length = min(one[0], other[0])
        yield length, one[1], other[1]
        one, other = (one[0] - length, one[1]), (other[0] - length, other[1])
        if one[0] == 0:
            following = next(ones, None)
            if following is None:
                return
            one = following
        if other[0] == 0:
            following = next(others, None)
            if following is None:
                return
            other = following


def joined(parts: Iterable[Changed]) -> Iterator[Changed]:
    """Yield the parts, neighbours of one kind as one."""
    last: Changed | None = None
    for part in parts:
        end = None if last is None else last.offset_bytes + last.length_bytes
        if last is not None and (end, last.zero) == (part.offset_bytes, part.zero):
            last = Changed(last.offset_bytes, last.length_bytes + part.length_bytes, last.zero)
            continue
        if last is not None:
            yield last
        last = part
    if last is not None:
        yield last
