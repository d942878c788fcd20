"""The judge itself: a lost, torn or foreign block is found, and what may be there passes."""

from __future__ import annotations

from tests.faults.flushed_writer import BlockHistory
from tests.faults.stamps import BLOCK_BYTES, DAMAGED, ZEROES, stamp, version_of


def test_stamp_says_its_version_and_nothing_else_does() -> None:
    content = stamp(7, 3, 12)
    assert len(content) == BLOCK_BYTES
    assert version_of(7, 3, content) == 12
    assert version_of(7, 3, bytes(BLOCK_BYTES)) == ZEROES
    for wrong in (
        stamp(7, 4, 12),
        stamp(8, 3, 12),
        content[:512] + stamp(7, 3, 11)[512:],
        content[:-1] + bytes([content[-1] ^ 1]),
    ):
        assert version_of(7, 3, wrong) == DAMAGED


def test_fresh_block_reads_as_zeroes_only() -> None:
    assert BlockHistory().judge(ZEROES) is None
    assert "never written" in (BlockHistory().judge(5) or "")
    assert "neither" in (BlockHistory().judge(DAMAGED) or "")


def test_block_with_a_write_in_flight_may_hold_either() -> None:
    history = BlockHistory(contents=[ZEROES, 4, 9], answered=1, flushed=1)
    assert history.judge(4) is None
    assert history.judge(9) is None
    assert history.judge(ZEROES) == "lost a flushed write: version 0 of [0, 4, 9]"


def test_answered_write_that_is_gone_is_told_from_a_flushed_one() -> None:
    history = BlockHistory(contents=[ZEROES, 4, 9], answered=2, flushed=1)
    assert history.judge(9) is None
    assert "an answered" in (history.judge(4) or "")
    assert "a flushed" in (history.judge(ZEROES) or "")
