"""Names of images."""

import pytest

from shard.errors import BadName
from vmstore.names import (
    ImageName,
    SnapshotName,
    parse_image_name,
    parse_name,
    parse_snapshot_name,
)


@pytest.mark.parametrize(
    ("text", "pool", "name"),
    [
        ("vms/disk", "vms", "disk"),
        ("vms/folder/disk 1.qcow2", "vms", "folder/disk 1.qcow2"),
        ("p/é\U0001f600", "p", "é\U0001f600"),
        ("p/..a/...", "p", "..a/..."),
        ("p/" + "x" * 255, "p", "x" * 255),
        ("p/" + "/".join(["x" * 204] * 5), "p", "/".join(["x" * 204] * 5)),
    ],
)
def test_valid_name_is_split(text: str, pool: str, name: str) -> None:
    parsed = parse_image_name(text)
    assert parsed == ImageName(pool, name)
    assert str(parsed) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no image: write POOL/NAME"),
        ("vms", "names no image: write POOL/NAME"),
        ("vms/", "is empty"),
        ("/disk", "is not a pool name"),
        ("Vms/disk", "is not a pool name"),
        ("vms//disk", "empty part"),
        ("vms/a//b", "empty part"),
        ("vms/a/", "empty part"),
        ("vms/.", "the part '.'"),
        ("vms/a/../b", r"the part '\.\.'"),
        ("vms/a@b", "kept for snapshots"),
        ("vms/a\0", "NUL"),
        ("vms/" + "é" * 128, "a part of 256 bytes"),
        ("vms/" + "/".join(["x" * 204] * 5) + "x", "has 1025 bytes"),
        ("vms/\udcff", "not UTF-8"),
    ],
)
def test_invalid_name_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(BadName, match=message) as raised:
        parse_image_name(text)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 250


@pytest.mark.parametrize(
    ("text", "image", "name"),
    [
        ("vms/disk@monday", "disk", "monday"),
        ("vms/a/b@before the update", "a/b", "before the update"),
        ("vms/disk@é\U0001f600...", "disk", "é\U0001f600..."),
        ("vms/disk@" + "x" * 255, "disk", "x" * 255),
    ],
)
def test_valid_snapshot_name_is_split(text: str, image: str, name: str) -> None:
    parsed = parse_snapshot_name(text)
    assert parsed == SnapshotName(ImageName("vms", image), name) == parse_name(text)
    assert str(parsed) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vms/disk", "names no snapshot: write POOL/IMAGE@NAME"),
        ("vms/disk@", "is empty"),
        ("vms@s", "names no image"),
        ("@s", "names no image"),
        ("vms/@s", "is empty"),
        ("vms/disk@.", "means a folder"),
        ("vms/disk@..", "means a folder"),
        ("vms/disk@a/b", "has a slash"),
        ("vms/disk@a@b", "has an '@'"),
        ("vms/disk@a\0", "NUL"),
        ("vms/disk@" + "é" * 128, "has 256 bytes; at most 255"),
        ("vms/disk@\udcff", "not UTF-8"),
    ],
)
def test_invalid_snapshot_name_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(BadName, match=message) as raised:
        parse_snapshot_name(text)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 250


def test_name_without_a_snapshot_is_an_images() -> None:
    assert parse_name("vms/disk") == ImageName("vms", "disk")
