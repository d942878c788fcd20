"""What a gateway says of extents, made into what was written."""

from vmstore import changes
from vmstore.changes import ASKED_BYTES, Changed

MIB = 1 << 20


def test_questions_cover_each_touched_shard_once_and_join_neighbours() -> None:
    parts = [(5, 6), (4 * MIB - 1, 4 * MIB + 1), (6 * MIB, 7 * MIB), (20 * MIB, 20 * MIB + 1)]
    asked = list(changes._asked(parts, 4 * MIB, 22 * MIB))
    assert asked == [(0, 8 * MIB), (20 * MIB, 22 * MIB)]
    assert list(changes._asked([], 4 * MIB, 22 * MIB)) == []


def test_questions_are_cut_where_they_would_be_asked_in_two_rounds() -> None:
    asked = list(changes._asked([(0, 2 * ASKED_BYTES + 1)], 4 * MIB, 3 * ASKED_BYTES))
    ends = [ASKED_BYTES, 2 * ASKED_BYTES, 2 * ASKED_BYTES + 4 * MIB]
    assert asked == list(zip([0, *ends], ends, strict=False))


def test_two_contexts_are_read_side_by_side_as_far_as_both_reach() -> None:
    dirty, allocated = [(3, 1), (2, 0)], [(1, 2), (1, 0), (2, 3)]
    assert list(changes._side_by_side(dirty, allocated)) == [
        *((1, 1, 2), (1, 1, 0), (1, 1, 3), (1, 0, 3)),
    ]


def test_neighbours_of_one_kind_are_joined() -> None:
    parts = [Changed(0, 4, False), Changed(4, 4, False), Changed(8, 4, True), Changed(16, 4, True)]
    joined = list(changes.joined(parts))
    assert joined == [Changed(0, 8, False), Changed(8, 4, True), Changed(16, 4, True)]
    assert list(changes.joined([])) == []
