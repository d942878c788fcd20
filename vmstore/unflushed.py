"""`Unflushed`: writes that were answered and not flushed, and whether they may be gone.

They live in the memory of the nodes in sync until those sync. Which boot of its host each node had
is written down with the processes that are served (`vmstore/served.py`): where all nodes in sync of
a replica set have another one when an image is opened again, the next flush fails. While an image
is served the engine sees to it.
"""

import structlog

from engine import Gateway
from vmstore.calls import Calls, nothing_more
from vmstore.open_image import OpenImage
from vmstore.served import Served
from vmstore.standing import Phase

log = structlog.get_logger()


class Unflushed:
    """What clients of one gateway were answered; for the deciding thread."""

    def __init__(self, engine: Gateway, served: Served, calls: Calls) -> None:
        self._engine = engine
        self._served = served
        self._calls = calls

    def tell_losses(self, image: OpenImage) -> None:
        """Have the next flush fail where what clients that live on were answered may be gone.

        That is so where they were served before, by this gateway or its predecessor, and all nodes
        in sync of a set lost their power since.
        """
        record = image.holder.record
        assert record is not None
        former = self._served.memory(image.image)
        membership = record.membership
        lost = [
            index
            for index in range(len(record.sets))
            if former
            and all(image.boots.get(n) != former.get(n) for n in membership.in_sync(index))
        ]
        if lost:
            image.writes_lost += 1
            log.error("unflushed_writes_lost", image=str(image.name), replica_sets=lost)
            self._engine.writes_lost(image.channel, lost)
        self.remember(image)

    def remember(self, image: OpenImage) -> None:
        """Write down whose memory holds what is answered, once all in sync have all of it."""
        holder = image.holder
        if holder.record is None or holder.phase is not Phase.SERVING or holder.levelling:
            return
        in_sync = holder.record.membership.all_in_sync()
        boots = {node: image.boots[node] for node in sorted(in_sync) if node in image.boots}
        if self._served.remember(image.image, boots):
            self._calls.later(self._served.save, nothing_more, nothing_more)
