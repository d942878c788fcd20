"""Digests of shards and their comparison."""

from shard.digest import DIGEST_BYTES, UNREADABLE, Difference, compare, digest, digest_of_zeroes

ZEROES = digest_of_zeroes(8192)
ONE, TWO, THREE = (digest([bytes([value])]) for value in (1, 2, 3))


def test_digest_of_content_does_not_depend_on_the_cuts() -> None:
    assert digest([b"abc", b"", b"def"]) == digest([b"abcdef"])
    assert len(ONE) == DIGEST_BYTES


def test_digest_of_nothing_is_the_published_value() -> None:
    """From the test vectors of the BLAKE3 paper's reference implementation."""
    assert digest([]).hex() == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"


def test_compare_of_equal_replicas_finds_nothing() -> None:
    assert compare({"a": {0: ONE, 5: TWO}, "b": {0: ONE, 5: TWO}}, ZEROES) == []
    assert compare({}, ZEROES) == []


def test_compare_with_one_node_apart_names_it() -> None:
    reported = {"a": {0: ONE, 1: TWO}, "b": {0: ONE, 1: ONE}, "c": {0: ONE, 1: TWO}}
    assert compare(reported, ZEROES) == [Difference(1, ("b",))]


def test_compare_without_majority_names_all() -> None:
    assert compare({"a": {3: ONE}, "b": {3: TWO}}, ZEROES) == [Difference(3, ("a", "b"))]
    three = {"a": {3: ONE}, "b": {3: TWO}, "c": {3: THREE}}
    assert compare(three, ZEROES) == [Difference(3, ("a", "b", "c"))]


def test_compare_with_a_shard_missing_counts_it_as_zeroes() -> None:
    assert compare({"a": {2: ZEROES}, "b": {}}, ZEROES) == []
    reported = {"a": {2: ONE}, "b": {2: ONE}, "c": {}}
    assert compare(reported, ZEROES) == [Difference(2, ("c",))]


def test_compare_with_an_unreadable_shard_names_its_node_and_counts_the_others() -> None:
    assert compare({"a": {1: ONE}, "b": {1: UNREADABLE}}, ZEROES) == [Difference(1, ("b",), ("b",))]
    three = {"a": {1: ONE}, "b": {1: UNREADABLE}, "c": {1: TWO}}
    assert compare(three, ZEROES) == [Difference(1, ("a", "b", "c"), ("b",))]
    none_left = {"a": {1: UNREADABLE}, "b": {1: UNREADABLE}}
    assert compare(none_left, ZEROES) == [Difference(1, ("a", "b"), ("a", "b"))]
