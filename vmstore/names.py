"""Names of images, `POOL/NAME`, where NAME is a UTF-8 path; and of snapshots, `POOL/IMAGE@NAME`.

Names are compared byte by byte; nothing is folded or normalised.
"""

from dataclasses import dataclass

from shard.errors import BadName
from shard.ids import COMPONENT_BYTES_MAX, pool_name, shown, snapshot_name

NAME_BYTES_MAX = 1024


@dataclass(frozen=True, slots=True, order=True)
class ImageName:
    """A valid name: the pool, and the path of the image within it."""

    pool: str
    name: str

    def __post_init__(self) -> None:
        pool_name(self.pool)
        _check_path(self.name)

    def __str__(self) -> str:
        return f"{self.pool}/{self.name}"


@dataclass(frozen=True, slots=True, order=True)
class SnapshotName:
    """A valid name of a snapshot: the image's, and its own within that image."""

    image: ImageName
    name: str

    def __post_init__(self) -> None:
        snapshot_name(self.name)

    def __str__(self) -> str:
        return f"{self.image}@{self.name}"


def parse_snapshot_name(text: str) -> SnapshotName:
    """Return the name that `POOL/IMAGE@NAME` means. Raises BadName: which part is wrong."""
    image, at, name = text.partition("@")
    if not at:
        raise BadName(f"{shown(text)} names no snapshot: write POOL/IMAGE@NAME")
    return SnapshotName(parse_image_name(image), name)


def parse_name(text: str) -> ImageName | SnapshotName:
    """Return the image or snapshot that a name means: what can be read. Raises BadName."""
    return parse_snapshot_name(text) if "@" in text else parse_image_name(text)


def parse_image_name(text: str) -> ImageName:
    """Return the name that `POOL/NAME` means. Raises BadName, which says which part is wrong."""
    pool, slash, name = text.partition("/")
    if not slash:
        raise BadName(f"{shown(text)} names no image: write POOL/NAME")
    return ImageName(pool, name)


def _check_path(name: str) -> None:
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise BadName(f"the image name {shown(name)} is not UTF-8") from None
    if not name:
        raise BadName("the image name is empty: write POOL/NAME")
    if size > NAME_BYTES_MAX:
        raise BadName(
            f"the image name {shown(name)} has {size} bytes; at most {NAME_BYTES_MAX} are allowed"
        )
    for component in name.split("/"):
        problem = _problem_of_component(component)
        if problem is not None:
            raise BadName(f"the image name {shown(name)} {problem}")


def _problem_of_component(component: str) -> str | None:
    if not component:
        return "has an empty part: it begins or ends with a slash, or has two in a row"
    if component in (".", ".."):
        return f"has the part '{component}', which means a folder"
    if "@" in component:
        return "has an '@', which is kept for snapshots"
    if "\0" in component:
        return "has a NUL byte"
    size = len(component.encode())
    if size > COMPONENT_BYTES_MAX:
        return f"has a part of {size} bytes; at most {COMPONENT_BYTES_MAX} are allowed"
    return None
