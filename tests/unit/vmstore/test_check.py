"""Comparing replicas: which are compared, and when a difference counts."""

from collections.abc import Collection, Mapping

import pytest

from etcd.images import ImageRecord
from shard.digest import UNREADABLE, Difference
from shard.ids import image_id
from shard.placement import replica_set_index
from tests.unit.samples import image_record
from vmstore import check

KEY = image_id("ab" * 16)
ONE, OTHER = bytes(32), bytes([1]) * 32


class Nodes:
    """Digests by node and shard; `calls` are the ranges that were asked for."""

    def __init__(self, digests: Mapping[str, dict[int, bytes]]) -> None:
        self.digests = digests
        self.calls: list[tuple[tuple[str, ...], int, int]] = []
        self.pauses: list[int] = []

    def __call__(
        self, nodes: Collection[str], first: int, count: int
    ) -> dict[str, dict[int, bytes]]:
        self.calls.append((tuple(nodes), first, count))
        wanted = range(first, first + count)
        return {
            node: {shard: value for shard, value in self.digests[node].items() if shard in wanted}
            for node in nodes
        }

    def compare(self, record: ImageRecord, up: Collection[str]) -> check.Report:
        return check.compare(record, up, self, lambda _done: None, self.pauses.append)


def image(
    shards: int, sets: tuple[tuple[str, ...], ...], stale: dict[int, dict[str, int]] | None = None
) -> ImageRecord:
    return image_record(
        KEY,
        size_bytes=shards << 20,
        shard_bytes=1 << 20,
        sets=sets,
        generation=2,
        stale=stale or {},
    )


def test_replicas_that_are_equal_are_compared_once() -> None:
    nodes = Nodes({name: {0: ONE, 3: OTHER} for name in "abc"})
    report = nodes.compare(image(4, (("a", "b", "c"),)), "abc")
    assert report.equal
    assert (report.shards, nodes.pauses) == (4, [])
    assert nodes.calls == [(("a", "b", "c"), 0, 4)]


def test_shard_that_stays_different_is_reported_with_who_is_alone() -> None:
    nodes = Nodes({"a": {2: ONE}, "b": {2: OTHER}, "c": {2: ONE}})
    report = nodes.compare(image(4, (("a", "b", "c"),)), "abc")
    assert [(each.shard, each.nodes) for each in report.different] == [(2, ("b",))]
    assert len(nodes.pauses) == check.ATTEMPTS - 1


def test_shard_that_differs_while_a_write_is_under_way_is_asked_again() -> None:
    nodes = Nodes({"a": {2: ONE}, "b": {2: OTHER}, "c": {2: ONE}})

    def land(attempt: int) -> None:
        nodes.pauses.append(attempt)
        nodes.digests["b"][2] = ONE

    report = check.compare(image(4, (("a", "b", "c"),)), "abc", nodes, lambda _done: None, land)
    assert report.equal
    assert nodes.calls[1:] == [(("a", "b", "c"), 2, 1)], "only that shard"


def test_nodes_that_are_stale_or_down_are_not_compared() -> None:
    nodes = Nodes({"a": {0: ONE}, "b": {0: OTHER}, "c": {0: ONE}})
    report = nodes.compare(image(1, (("a", "b", "c"),), {0: {"b": 1}}), "abc")
    assert report.equal
    assert (report.compared, report.missing) == ([("a", "c")], [])
    report = nodes.compare(image(1, (("a", "b", "c"),)), "ac")
    assert report.equal
    assert (report.compared, report.missing) == ([("a", "c")], ["b"])


@pytest.mark.parametrize("up", ["a", ""])
def test_replica_set_with_fewer_than_two_nodes_up_is_not_called_equal(up: str) -> None:
    # With one node up, or none, nothing was compared and the answer was that all is equal.
    nodes = Nodes({name: {0: ONE} for name in "abcdef"})
    report = nodes.compare(image(4, (("a", "b", "c"), ("d", "e", "f"))), [*up, "d", "e"])
    assert not report.equal
    assert (report.different, report.not_compared) == ([], [0])
    assert report.missing == sorted({"a", "b", "c", "f"} - set(up))


def test_shard_that_a_node_cannot_read_is_reported_with_that_node() -> None:
    # A damaged shard ended the whole check with "an internal error".
    nodes = Nodes({"a": {2: ONE}, "b": {2: UNREADABLE}, "c": {2: ONE}})
    report = nodes.compare(image(4, (("a", "b", "c"),)), "abc")
    assert report.different == [Difference(2, ("b",), ("b",))]
    alone = nodes.compare(image(4, (("a", "b", "c"),)), "b")
    assert alone.different == [Difference(2, ("b",), ("b",))]
    assert alone.not_compared == [0]


def test_shards_are_compared_on_the_nodes_of_their_own_replica_set() -> None:
    sets = (("a", "b", "c"), ("d", "e", "f"))
    of_second = next(shard for shard in range(64) if replica_set_index(KEY, shard, 2) == 1)
    digests: dict[str, dict[int, bytes]] = {name: {} for name in "abcdef"}
    digests["a"][of_second] = ONE  # left over from a former placement
    digests["d"][of_second] = digests["e"][of_second] = ONE
    report = Nodes(digests).compare(image(64, sets), "abcdef")
    assert [(each.shard, each.nodes) for each in report.different] == [(of_second, ("f",))]


def test_image_of_the_largest_size_is_compared_in_few_questions() -> None:
    nodes = Nodes({name: {} for name in "abc"})
    report = nodes.compare(image(1 << 28, (("a", "b", "c"),)), "abc")
    assert report.equal
    assert len(nodes.calls) <= check.BATCHES_MAX
