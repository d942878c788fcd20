"""`Sessions`: the etcd lease that a gateway's leases of images live on, one after the other.

    the etcd lease    then
    is renewed        the engine is told until when the leases of images certainly live
    is gone           another one is taken, and on it again the leases of all open images

An image whose lease was not taken again keeps the deadline that it had, and is served up to there;
only that another gateway has had it makes us let go of it (`Lost`).
"""

from collections.abc import Callable, Mapping

import structlog

from etcd.errors import EtcdError
from etcd.lease import Session
from shard.errors import HciError
from shard.ids import ImageId
from vmstore import events
from vmstore.calls import RELEASE_RETRY_S, Calls
from vmstore.catalog import Catalog
from vmstore.channels import Channels
from vmstore.deciding import Deciding
from vmstore.errors import RecordChanged
from vmstore.holding import Held
from vmstore.lost_history import LostHistory, is_behind, is_gone
from vmstore.open_image import OpenImage
from vmstore.standing import Phase

log = structlog.get_logger()


class Sessions:
    """The sessions of one gateway; for the deciding thread, `lease` for workers too.

    `begin` makes one, given what to call when it is lost and renewed. `hear` takes what the holder
    of an image is to hear.
    """

    def __init__(
        self,
        begin: Callable[[Callable[[], None], Callable[[float], None]], Session],
        calls: Calls,
        deciding: Deciding,
        catalog: Catalog,
        channels: Channels,
        history: LostHistory,
        images: Mapping[ImageId, OpenImage],
        *,
        hear: Callable[[OpenImage, events.Event], None],
    ) -> None:
        self._begin = begin
        self._calls = calls
        self._deciding = deciding
        self._catalog = catalog
        self._channels = channels
        self._history = history
        self._images = images
        self._hear = hear
        self._now: Session | None = None

    def start(self) -> None:
        """Take an etcd lease. Raises EtcdUnavailable."""
        self._now = self._started()

    def close(self) -> None:
        """Give the etcd lease back, and what lives on it."""
        if self._now is not None:
            self._now.close()

    @property
    def lease(self) -> int:
        """The etcd lease to take leases of images on."""
        assert self._now is not None
        return self._now.lease

    def has_ended(self, etcd_lease: int) -> bool:
        """Whether an etcd lease of ours is known to be gone."""
        assert self._now is not None
        return self._now.lost or self._now.lease != etcd_lease

    def opened(self, image: OpenImage) -> None:
        """Look after the lease of an image that the engine has begun with."""
        self.tell_deadline(image)
        assert image.held is not None
        if image.held.etcd_lease != self.lease:
            # Taken on a session that ended before we heard of it: nobody else takes it again.
            self.retake(image)

    def _started(self) -> Session:
        return self._begin(self._lost, self._renewed).start()

    # Renewed

    def _renewed(self, _deadline_s: float) -> None:
        self._deciding.put(self._tell_deadlines)

    def _tell_deadlines(self) -> None:
        for image in self._images.values():
            if image.holder.phase not in (Phase.TAKING, Phase.ENDED):
                self.tell_deadline(image)

    def tell_deadline(self, image: OpenImage) -> None:
        """Tell the engine how long an image's lease certainly lives, if it lives on our session.

        After the session's end the images' leases are taken again one by one; until its own is, an
        image has the deadline that it had.
        """
        assert self._now is not None
        if image.held is None or image.held.etcd_lease != self._now.lease:
            return
        self._channels.tell_deadline(image, self._now.deadline_s)

    # Gone

    def _lost(self) -> None:
        self._deciding.put(self._renew)

    def _renew(self) -> None:
        """The etcd lease is gone: take a new one, and again the images' leases that just lapsed."""
        log.warning("etcd_lease_lost")

        def again(session: Session) -> None:
            self._now = session
            for image in list(self._images.values()):
                self.retake(image)

        def failed(_error: HciError) -> None:
            self._deciding.after(1.0, self._renew)

        self._calls.later(self._started, again, failed)

    def retake(self, image: OpenImage) -> None:
        """Take an image's lease again, on the session that there is."""
        if image.held is None or image.holder.phase in (Phase.RELEASING, Phase.ENDED):
            return
        held, lease = image.held, self.lease

        def taken(new: Held) -> None:
            if image.held is not None:
                image.held = Held(image.held.image, new.lease, new.etcd_lease)
            self.tell_deadline(image)

        def failed(error: HciError) -> None:
            if isinstance(error, EtcdError | RecordChanged):
                # Without it the next gateway that is asked would take the image from its guest.
                self._deciding.after(RELEASE_RETRY_S, lambda: self.retake(image))
            elif is_gone(image, error):
                self._hear(image, events.Lost(str(error)))
            elif is_behind(error):
                self._history.suspect(image, error)
                self._deciding.after(RELEASE_RETRY_S, lambda: self.retake(image))
            else:
                self._hear(image, events.Lost(str(error)))

        self._calls.later(lambda: self._catalog.retake_lease(held, lease), taken, failed)
