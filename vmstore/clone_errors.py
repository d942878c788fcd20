"""Errors of clones: one line each, as in `vmstore.errors`.

VmstoreError
├── HasClones              what clones begin on was to go
├── CloneElsewhere         a clone in another pool than its parent
├── ChainTooLong           a clone of a clone of a clone …
└── LayersTooMany          a clone would begin on more layers than reads may pass through
"""

from collections.abc import Sequence

from vmstore.errors import VmstoreError

SHOWN_MAX = 5
"""Names of clones in a message; a template may have hundreds."""


class HasClones(VmstoreError):
    """Clones begin on what was to go: an image, a snapshot, or what is newer than a snapshot."""

    def __init__(self, what: str, clones: Sequence[str]) -> None:
        self.what = what
        self.clones = tuple(clones)
        several = len(clones) > 1
        count = f"{len(clones)} clones begin" if several else "a clone begins"
        names = ", ".join([*clones[:SHOWN_MAX], *(["…"] if len(clones) > SHOWN_MAX else [])])
        super().__init__(
            f"{what} cannot go: {count} on what it holds ({names}); remove "
            f"{'them' if several else 'it'} first with `hci image rm`"
        )


class CloneElsewhere(VmstoreError):
    """A clone was to be in another pool than its parent, beside whose data its own lies."""

    def __init__(self, source: str, pool: str) -> None:
        self.source = source
        self.pool = pool
        super().__init__(
            f"a clone of {source} lies in its pool, not in {pool}; to copy it there, export it and "
            "import it"
        )


class ChainTooLong(VmstoreError):
    """A clone would have more ancestors than reads may pass through."""

    def __init__(self, source: str, images_max: int) -> None:
        self.source = source
        self.images_max = images_max
        super().__init__(
            f"{source} cannot be cloned: it is the last of {images_max} images of which each is a "
            "clone of the one before, and a longer chain would be slow; export it and import it as "
            "a new image"
        )


class LayersTooMany(VmstoreError):
    """A clone would begin on more layers than reads may pass through."""

    def __init__(self, source: str, layers: int, layers_max: int) -> None:
        self.source = source
        self.layers = layers
        self.layers_max = layers_max
        super().__init__(
            f"{source} cannot be cloned: it has {layers} layers below it, those of its ancestors "
            f"counted, and {layers_max} is the limit; remove older snapshots, or export it and "
            "import it as a new image"
        )
