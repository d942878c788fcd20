"""`FullDisks`: what clients see while too many disks of a replica set are full.

They wait, or are told ENOSPC: what their pool says now, which is asked anew while disks are full.
While etcd does not say it, it stays as it was. Whether disks are full an image's holder knows.
"""

from collections.abc import Mapping

import structlog

from etcd.records import PoolRecord
from shard.errors import HciError
from shard.ids import ImageId
from shard.membership import WhenFull
from vmstore.calls import Calls
from vmstore.catalog import Catalog
from vmstore.channels import Channels
from vmstore.deciding import Deciding
from vmstore.open_image import OpenImage
from vmstore.stored import Stored

log = structlog.get_logger()

FULL_ASK_S = 5.0
"""Until a pool is asked again what its clients are to see while disks are full."""


class FullDisks:
    """Minds the full disks of the open `images`; for the deciding thread."""

    def __init__(
        self,
        calls: Calls,
        deciding: Deciding,
        catalog: Catalog,
        channels: Channels,
        images: Mapping[ImageId, OpenImage],
    ) -> None:
        self._calls = calls
        self._deciding = deciding
        self._catalog = catalog
        self._channels = channels
        self._images = images

    def mind(self, image: OpenImage) -> None:
        """Have an image's clients wait, or hear of it, while too many disks are full."""
        record, now_s = image.holder.record, self._deciding.now_s()
        if record is None or not image.holder.without_space():
            image.full_asked_s = None
            self._channels.refuse_writes(image, frozenset())
            return
        if image.full_asked_s is not None and now_s - image.full_asked_s < FULL_ASK_S:
            return
        image.full_asked_s = now_s

        def told(pool: Stored[PoolRecord]) -> None:
            tells = pool.record.when_full is WhenFull.ENOSPC
            if self._images.get(image.image) is image:
                sets = image.holder.without_space() if tells else frozenset()
                self._channels.refuse_writes(image, sets)

        def failed(error: HciError) -> None:
            log.warning("when_full_unknown", image=str(image.name), why=str(error))

        self._calls.later(lambda: self._catalog.pool(record.pool), told, failed)
