"""`Calls`: what a gateway asks etcd and arbiters for its open images, without waiting for it.

A call is made in a worker (`vmstore/deciding.py`); what comes of it is handed to `then` or `failed`
on the deciding thread. Once the gateway is stopping and its last image is closed no call is begun,
and nothing is handed to anybody.
"""

from collections.abc import Callable, Mapping
from typing import Any

from shard.errors import HciError
from shard.ids import ImageId
from vmstore import granting
from vmstore.deciding import Deciding
from vmstore.granter import Granter
from vmstore.holding import Held
from vmstore.open_image import OpenImage

OPEN_RETRY_S = 0.5
"""Until etcd is asked again for an image that a client waits for, or an arbiter to confirm it."""
RELEASE_RETRY_S = 1.0
"""Until etcd is asked again to take a lease back, or to give one that has lapsed."""


class Calls:
    """Makes calls for the `images` that are open; for the deciding thread."""

    def __init__(
        self, deciding: Deciding, granter: Granter, images: Mapping[ImageId, OpenImage]
    ) -> None:
        self._deciding = deciding
        self._granter = granter
        self._images = images
        self.stopping = False
        """The gateway stops: images are closed, and none is opened any more."""

    def later(
        self,
        call: Callable[[], Any],
        then: Callable[[Any], None],
        failed: Callable[[HciError], None],
    ) -> None:
        """Make an etcd call elsewhere; its outcome comes back to where it is decided."""
        if not self.stopping or self._images:
            self._deciding.call(call, then, failed)

    def carry_through(
        self,
        steps: granting.Steps,
        then: Callable[[Held], None],
        failed: Callable[[HciError], None],
    ) -> None:
        """Make the steps of a procedure in workers, one at a time."""

        def go_on(advance: Callable[[], granting.Step]) -> None:
            try:
                step = advance()
            except StopIteration as end:
                then(end.value)
            except HciError as error:
                failed(error)
            else:
                self.later(
                    lambda: self._granter.make(step),
                    lambda result: go_on(lambda: steps.send(result)),
                    lambda error: go_on(lambda: steps.throw(error)),
                )

        go_on(lambda: next(steps))


def nothing_more(_outcome: object) -> None:
    """Whatever came of it was logged."""
