"""`LostHistory`: an etcd that lost history, as a gateway meets it that has images open.

Who holds an image knows its latest record. An etcd that is behind that is marked for everybody, and
nothing is begun by it until its records were recovered; the image is served on as it is. A recovery
raises the epochs of what was lost: an image whose epoch was raised is ours no more (`Lost`).
"""

from collections.abc import Callable

import structlog

from etcd.images import ImageRecord
from shard.errors import HciError
from vmstore import events
from vmstore.calls import Calls, nothing_more
from vmstore.catalog import Catalog
from vmstore.errors import HistoryLost, RecordsLost, UnknownImage
from vmstore.open_image import OpenImage
from vmstore.standing import Phase
from vmstore.stored import Stored

log = structlog.get_logger()


def is_behind(error: HciError) -> bool:
    """Whether etcd lost what we know of an image; a deleted one is not told apart here."""
    return isinstance(error, HistoryLost | RecordsLost | UnknownImage)


def is_gone(image: OpenImage, error: HciError) -> bool:
    """Whether etcd holds nothing of an image that no client has: it was deleted as it was healed.

    Its nodes say so where they are asked; nobody may ask them any more.
    """
    nothing = isinstance(error, UnknownImage)
    nothing |= isinstance(error, HistoryLost) and error.found == (0, 0)
    return image.maintenance and nothing


class LostHistory:
    """Marks an etcd that is behind, and looks what became of it; for the deciding thread.

    `hear` takes what the holder of an image is to hear.
    """

    def __init__(
        self,
        calls: Calls,
        catalog: Catalog,
        *,
        gateway: str,
        hear: Callable[[OpenImage, events.Event], None],
    ) -> None:
        self._calls = calls
        self._catalog = catalog
        self._gateway = gateway
        self._hear = hear

    def suspect(self, image: OpenImage, error: HciError) -> None:
        """Have everybody know that etcd is behind, if it is; the image is served as it is."""

        def marked(is_behind: bool) -> None:
            if is_behind and not image.behind:
                image.behind = True
                log.error("history_lost", image=str(image.name), why=str(error))

        image.holder.trouble = image.holder.trouble or str(error)
        self._calls.later(lambda: self._mark(image), marked, nothing_more)

    def _mark(self, image: OpenImage) -> bool:
        """Say in etcd that it is behind what we hold, if it surely is; return whether it is.

        An image that is not in it may have been deleted while our lease had lapsed: its tombstone
        goes once all its nodes have it. They have its record as well, and can tell.
        """
        assert image.held is not None
        known = image.held.record
        cluster = self._catalog.stored_cluster()
        try:
            found = self._catalog.image(image.image).record
        except UnknownImage:
            if cluster is not None:
                return False
            why = "it holds nothing of this cluster"
        else:
            if not found.is_behind(known):
                return False
            why = (
                f"image {image.name} is at epoch {found.epoch}, generation {found.generation} "
                f"in it, and epoch {known.epoch}, generation {known.generation} is served"
            )
        self._catalog.mark_lost(f"gateway {self._gateway}", why, cluster)
        return True

    def look_at(self, images: list[OpenImage]) -> None:
        """Look whether a recovery of etcd's records has left us these images."""
        for image in images:
            if image.held is not None and image.holder.phase is not Phase.RELEASING:
                self._look_at(image)

    def _look_at(self, image: OpenImage) -> None:
        assert image.held is not None
        known = image.held.record

        def found(stored: Stored[ImageRecord]) -> None:
            if stored.record.epoch > known.epoch:
                why = f"the record of {image.name} was recovered"
                self._hear(image, events.Lost(why))

        self._calls.later(lambda: self._catalog.image(image.image), found, nothing_more)
