"""Names of images: `POOL/NAME`, where NAME is a UTF-8 path.

Names are compared byte by byte; nothing is folded or normalised. `@` is kept for snapshots.
"""

from dataclasses import dataclass

from shard.errors import BadName
from shard.ids import pool_name

NAME_BYTES_MAX = 1024
COMPONENT_BYTES_MAX = 255


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


def parse_image_name(text: str) -> ImageName:
    """Return the name that `POOL/NAME` means. Raises BadName, which says which part is wrong."""
    pool, slash, name = text.partition("/")
    if not slash:
        raise BadName(f"{_shown(text)} names no image: write POOL/NAME")
    return ImageName(pool, name)


def _check_path(name: str) -> None:
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise BadName(f"the image name {_shown(name)} is not UTF-8") from None
    if not name:
        raise BadName("the image name is empty: write POOL/NAME")
    if size > NAME_BYTES_MAX:
        raise BadName(
            f"the image name {_shown(name)} has {size} bytes; at most {NAME_BYTES_MAX} are allowed"
        )
    for component in name.split("/"):
        problem = _problem_of_component(component)
        if problem is not None:
            raise BadName(f"the image name {_shown(name)} {problem}")


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


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
