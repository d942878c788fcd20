"""When an image is scrubbed."""

from shard.scrub import Due, ScrubLimits, Times, due

DAY_MS = 86_400_000
WEEKLY = ScrubLimits(every_s=7 * 86_400)
NEVER = ScrubLimits(every_s=0)


def test_a_scrub_asked_for_is_due_at_once_also_without_a_schedule() -> None:
    assert due(Times(asked_ms=5), NEVER, 10) is Due.ASKED
    assert due(Times(asked_ms=5, stopped_ms=6), NEVER, 10) is None
    assert due(Times(asked_ms=7, stopped_ms=6), NEVER, 10) is Due.ASKED


def test_a_scrub_that_was_begun_goes_on_until_it_is_through_or_stopped() -> None:
    assert due(Times(asked_ms=5, begun_ms=6), NEVER, 10) is Due.BEGUN
    assert due(Times(begun_ms=6, finished_ms=7), NEVER, 10) is None
    assert due(Times(begun_ms=6, stopped_ms=7), NEVER, 10) is None


def test_the_schedule_counts_from_the_last_scrub_or_from_when_the_image_was_seen() -> None:
    assert due(Times(), WEEKLY, 100 * DAY_MS) is None, "nobody has seen it before"
    assert due(Times(seen_ms=DAY_MS), WEEKLY, 7 * DAY_MS) is None
    assert due(Times(seen_ms=DAY_MS), WEEKLY, 8 * DAY_MS) is Due.SCHEDULED
    scrubbed = Times(seen_ms=DAY_MS, begun_ms=8 * DAY_MS, finished_ms=9 * DAY_MS)
    assert due(scrubbed, WEEKLY, 15 * DAY_MS) is None
    assert due(scrubbed, WEEKLY, 16 * DAY_MS) is Due.SCHEDULED
    assert due(scrubbed, NEVER, 16 * DAY_MS) is None


def test_what_was_passed_over_is_due_when_its_node_is_back() -> None:
    through = Times(begun_ms=6, finished_ms=7)
    assert due(through, NEVER, 10, missed_is_back=True) is Due.MISSED
    assert due(through, NEVER, 10) is None
    assert due(Times(begun_ms=6), NEVER, 10, missed_is_back=True) is Due.BEGUN
    stopped = Times(begun_ms=6, finished_ms=7, stopped_ms=8)
    assert due(stopped, NEVER, 10, missed_is_back=True) is None


def test_what_is_asked_for_comes_before_what_was_begun_and_the_schedule() -> None:
    assert sorted([Due.SCHEDULED, Due.ASKED, Due.BEGUN]) == [Due.ASKED, Due.BEGUN, Due.SCHEDULED]
