"""The record of an image's scrub."""

from dataclasses import replace

import pytest

from etcd.errors import MalformedRecord
from etcd.scrubs import CLOCK_ERROR_MS, LISTED_MAX, BadBlocks, Findings, ScrubRecord
from shard.ids import image_id

IMAGE = image_id("0123456789abcdef0123456789abcdef")


def test_a_record_is_read_back_with_what_a_newer_version_added() -> None:
    bad = (BadBlocks(3, 7), BadBlocks(4, 1, 2, ("node1", "node2")))
    findings = Findings(4096, 5, 3, 1, 2, bad, ("node3",))
    record = ScrubRecord(image=IMAGE, asked_ms=1, begun_ms=2, next_shard=9, now=findings)
    newer = replace(record, extra={"speed": 3})
    assert ScrubRecord.decode(record.key, newer.encode()) == newer


def test_a_record_that_makes_no_sense_is_refused() -> None:
    text = ScrubRecord(image=IMAGE).encode().replace(b'"next_shard":0', b'"next_shard":-1')
    with pytest.raises(MalformedRecord):
        ScrubRecord.decode("/hci/scrubs/x", text)


def test_a_scrub_that_was_begun_is_gone_on_with_and_a_new_one_begins_anew() -> None:
    record = ScrubRecord(image=IMAGE).asked(100).begin(110)
    assert record.times.is_under_way
    further = replace(record, next_shard=7, now=Findings(read_bytes=5))
    assert further.begin(200) == further
    stopped = further.stopped(300)
    assert not stopped.times.is_under_way and not stopped.times.is_asked
    again = stopped.asked(300).begin(300)
    assert again.times.is_under_way and again.next_shard == 0 and again.now == Findings()


def test_times_tell_right_also_where_clocks_of_hosts_differ() -> None:
    record = ScrubRecord(image=IMAGE).asked(1000).begin(10)
    assert record.times.is_under_way and not record.times.is_asked
    stopped = record.stopped(5)
    assert not stopped.times.is_under_way
    assert stopped.asked(3).times.is_asked


def test_times_of_a_clock_that_was_years_ahead_are_set_right_in_their_order() -> None:
    # Nothing would have been scrubbed by schedule before that time, for years.
    ahead_ms = 10 * 365 * CLOCK_ERROR_MS
    done = replace(ScrubRecord(image=IMAGE, seen_ms=5).begin(ahead_ms), finished_ms=ahead_ms + 7)
    waits = done.asked(ahead_ms + 9)
    under_way = waits.begin(ahead_ms + 20)
    now_ms = 1000
    assert done.set_right(now_ms).finished_ms == now_ms
    assert done.set_right(now_ms).begun_ms == now_ms - 7
    assert done.set_right(now_ms).seen_ms == 1
    assert done.set_right(now_ms).stopped_ms == 0
    assert waits.set_right(now_ms).times.is_asked
    assert under_way.set_right(now_ms).times.is_under_way
    near = done.begin(ahead_ms + 100)
    assert near.set_right(near.begun_ms - CLOCK_ERROR_MS + 1) == near


def test_findings_of_two_parts_are_added_and_bounded() -> None:
    many = Findings(bad=tuple(BadBlocks(shard, 0) for shard in range(LISTED_MAX)))
    more = Findings(read_bytes=1, found=2, bad=(BadBlocks(9999, 0),), missed=("node1",))
    both = many.plus(more)
    assert (both.read_bytes, both.found, both.missed) == (1, 2, ("node1",))
    assert len(both.bad) == LISTED_MAX
    assert both.plus(both).bad == both.bad
