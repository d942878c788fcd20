"""Ids and names: how they look, and nothing about what they name."""

import re
from typing import NewType

from shard.errors import BadName

ImageId = NewType("ImageId", str)
"""Random 128-bit id of an image, never reused: 32 lower-case hex digits."""

NAME_PATTERN = r"[a-z0-9][a-z0-9-]{0,62}"
"""What names of nodes, arbiters and pools look like."""

COMPONENT_BYTES_MAX = 255
"""Of a part of an image's path, and of a snapshot's name: what file systems allow."""

_NAME = re.compile(NAME_PATTERN)
_HEX_32 = re.compile(r"[0-9a-f]{32}")


def image_id(text: str) -> ImageId:
    """Return `text` as an image id. Raises BadName where it is not 32 lower-case hex digits."""
    return ImageId(_hex_32(text, "image id"))


def image_id_from_bytes(value: bytes) -> ImageId:
    """Return the image id of 16 bytes, which the caller drew at random."""
    if len(value) != 16:
        raise BadName(f"an image id has 16 bytes, not {len(value)}")
    return ImageId(value.hex())


def holder_id(text: str) -> str:
    """Return `text` as the id of a gateway process: 32 lower-case hex digits, or BadName."""
    return _hex_32(text, "holder id")


def node_name(text: str) -> str:
    """Return `text` where it is a node's name, or raise BadName."""
    return _name(text, "a node")


def arbiter_name(text: str) -> str:
    """Return `text` where it is an arbiter's name, or raise BadName."""
    return _name(text, "an arbiter")


def pool_name(text: str) -> str:
    """Return `text` where it is a pool's name, or raise BadName."""
    return _name(text, "a pool")


def snapshot_name(text: str) -> str:
    """Return `text` where it is a snapshot's name, or raise BadName, which says what is wrong."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise BadName(f"the snapshot name {shown(text)} is not UTF-8") from None
    if not text:
        problem = "is empty: write POOL/IMAGE@NAME"
    elif text in (".", ".."):
        problem = "means a folder"
    elif "/" in text:
        problem = "has a slash"
    elif "@" in text:
        problem = "has an '@', which stands before it"
    elif "\0" in text:
        problem = "has a NUL byte"
    elif size > COMPONENT_BYTES_MAX:
        problem = f"has {size} bytes; at most {COMPONENT_BYTES_MAX} are allowed"
    else:
        return text
    raise BadName(f"the snapshot name {shown(text)} {problem}")


def shown(text: str) -> str:
    """Return a name that somebody gave, as a message shows it."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _name(text: str, what: str) -> str:
    if not _NAME.fullmatch(text):
        raise BadName(
            f"{text!r} is not {what} name: use 1 to 63 lower-case letters, digits and hyphens, "
            "not beginning with a hyphen"
        )
    return text


def _hex_32(text: str, what: str) -> str:
    if not _HEX_32.fullmatch(text):
        raise BadName(f"{text!r} is no {what}: 32 lower-case hex digits are")
    return text
