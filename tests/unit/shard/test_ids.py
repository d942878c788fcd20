"""How ids and names look."""

import pytest

from shard.errors import BadName
from shard.ids import (
    arbiter_name,
    holder_id,
    image_id,
    image_id_from_bytes,
    node_name,
    pool_name,
)


def test_image_id_of_hex_text_is_taken() -> None:
    assert image_id("0123456789abcdef" * 2) == "0123456789abcdef" * 2
    assert image_id_from_bytes(bytes(range(16))) == "000102030405060708090a0b0c0d0e0f"


@pytest.mark.parametrize("text", ["", "0" * 31, "0" * 33, "G" * 32, "A" * 32, "0" * 32 + "\n"])
def test_image_id_of_other_text_is_refused(text: str) -> None:
    with pytest.raises(BadName, match="no image id"):
        image_id(text)
    with pytest.raises(BadName, match="no holder id"):
        holder_id(text)


def test_image_id_from_wrong_length_is_refused() -> None:
    with pytest.raises(BadName, match="16 bytes"):
        image_id_from_bytes(bytes(15))


@pytest.mark.parametrize("text", ["a", "node1", "0", "a-b-", "x" * 63])
def test_name_within_its_rule_is_taken(text: str) -> None:
    assert node_name(text) == text
    assert pool_name(text) == text
    assert arbiter_name(text) == text


@pytest.mark.parametrize(
    "text", ["", "-a", "A", "a_b", "a.b", "a/b", "x" * 64, "a\n", "é", "\udcff"]
)
def test_name_outside_its_rule_is_refused(text: str) -> None:
    with pytest.raises(BadName, match="is not a node name"):
        node_name(text)
    with pytest.raises(BadName, match="is not a pool name"):
        pool_name(text)
    with pytest.raises(BadName, match="is not an arbiter name"):
        arbiter_name(text)
