"""Names of images."""

import pytest

from shard.errors import BadName
from vmstore.names import ImageName, parse_image_name


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
