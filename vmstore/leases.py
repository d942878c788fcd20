"""`Leases`: the leases of images that a gateway takes, has confirmed, and gives back.

    an open            then
    takes the lease    etcd has it in our name; where it is the dead's, or only for maintenance, it
                       takes that one's place
    is confirmed       the arbiter of the pool knows what etcd holds, where one has to
    begins             `taken` hears of it
    comes to nothing   the lease is given back, and the image's holder hears `Fail`

What may pass is waited for as long as a client wants the image, up to a limit. A lease is given
back however long that takes: one of a process that lives keeps all others away. Who is in sync, and
what is done with an image once it is ours, is not decided here.
"""

from collections.abc import Callable, Mapping

import structlog

from etcd.errors import EtcdError, EtcdUnavailable, LeaseNotFound, OutcomeUnknown
from etcd.records import LeaseRecord
from shard.errors import HciError
from shard.ids import ImageId
from vmstore import events, granting
from vmstore.calls import OPEN_RETRY_S, RELEASE_RETRY_S, Calls, nothing_more
from vmstore.catalog import Catalog
from vmstore.deciding import Deciding
from vmstore.errors import InUse, LeaseMoved, RecordChanged
from vmstore.holder import OPEN_LIMIT_S
from vmstore.holding import Held
from vmstore.open_image import OpenImage
from vmstore.served import Served
from vmstore.sessions import Sessions

log = structlog.get_logger()

TAKE_ATTEMPTS = 5
"""Times a lease is asked for while the record changes under our eyes."""


class Leases:
    """The leases of one process of a gateway; for the deciding thread.

    `gateway`, `holder` and `lock` tell this process: see `Serving`. `hear` takes what the holder of
    an image is to hear, `taken` an image whose lease is ours.
    """

    def __init__(
        self,
        calls: Calls,
        deciding: Deciding,
        catalog: Catalog,
        sessions: Sessions,
        served: Served,
        images: Mapping[ImageId, OpenImage],
        *,
        gateway: str,
        holder: str,
        lock: str | None,
        hear: Callable[[OpenImage, events.Event], None],
        taken: Callable[[OpenImage, Held], None],
    ) -> None:
        self._calls = calls
        self._deciding = deciding
        self._catalog = catalog
        self._sessions = sessions
        self._served = served
        self._images = images
        self._gateway = gateway
        self._holder_id = holder
        self._lock = lock
        self._hear = hear
        self._taken = taken
        self._unheard: set[ImageId] = set()
        """Images whose lease may be ours by a call whose answer was lost."""

    # Taken

    def take(self, image: OpenImage, give_up_s: float) -> None:
        """Take the lease of an image that is to be opened; not later than `give_up_s`."""

        def taken(held: Held) -> None:
            log.info("image_taken", image=str(image.name), epoch=held.record.epoch)
            image.holder.trouble = ""
            if granting.needs_arbiter_to_open(held.record):
                self._confirm(image, held, self._deciding.now_s() + OPEN_LIMIT_S)
            else:
                self._taken(image, held)

        def failed(error: HciError) -> None:
            # etcd elects a leader, or our own etcd lease ended while we were cut off from it.
            may_pass = isinstance(error, EtcdUnavailable | LeaseNotFound)
            if may_pass and self._waits(image, error, give_up_s):
                self._deciding.after(OPEN_RETRY_S, lambda: self.take(image, give_up_s))
                return
            log.info("image_refused", image=str(image.name), why=str(error))
            self._hear(image, events.Fail(str(error)))
            if isinstance(error, OutcomeUnknown) and image.image not in self._unheard:
                self._unheard.add(image.image)
                self._deciding.after(RELEASE_RETRY_S, lambda: self._let_go_unheard(image.image))

        self._calls.later(lambda: self._try_to_take(image), taken, failed)

    def _try_to_take(self, image: OpenImage) -> Held:
        for attempt in range(TAKE_ATTEMPTS):
            stored = self._catalog.image(image.image)
            lease = self._catalog.lease_of(image.image)
            mine = lease is not None and self._is_of_the_dead(lease.record)
            # One for maintenance yields, but not to another such.
            yields = lease is not None and lease.record.maintenance and not image.maintenance
            try:
                held = self._catalog.take_lease(
                    stored,
                    gateway=self._gateway,
                    holder=self._holder_id,
                    etcd_lease=self._sessions.lease,
                    lock=self._lock,
                    instead_of=lease if mine or yields else None,
                    maintenance=image.maintenance,
                )
                self._served.taken(stored.record, held.record)
                return held
            except InUse as error:
                other = error.gateway
                if other == self._gateway:
                    other += " (another one of this name, or this one before its host restarted)"
                raise InUse(str(image.name), other) from error
            except RecordChanged:
                if attempt + 1 == TAKE_ATTEMPTS:
                    raise
        raise AssertionError("the last attempt returns or raises")

    def _is_of_the_dead(self, lease: LeaseRecord) -> bool:
        """Whether a lease is that of a former process of ours: we hold its lock, so it is dead.

        The name alone does not say so: two hosts may have been given the same one.
        """
        return lease.gateway == self._gateway and lease.lock in (None, self._lock)

    def _confirm(self, image: OpenImage, held: Held, give_up_s: float) -> None:
        """Have the arbiter confirm what etcd holds, then begin; no request is served before."""

        def confirmed(held: Held) -> None:
            if self._sessions.has_ended(held.etcd_lease):
                self._give_back(image, held, "its lease ended while the arbiter was asked")
                return
            image.holder.trouble = ""
            self._taken(image, held)

        def failed(error: HciError) -> None:
            if granting.may_pass(error) and self._waits(image, error, give_up_s):
                self._deciding.after(OPEN_RETRY_S, lambda: self._confirm(image, held, give_up_s))
            else:
                self._give_back(image, held, str(error))

        self._calls.carry_through(granting.opening(held), confirmed, failed)

    def _waits(self, image: OpenImage, error: HciError, give_up_s: float) -> bool:
        """Whether an open goes on in spite of what may pass: for clients, and not for ever."""
        wanted = bool(image.users or image.waiting) and not self._calls.stopping
        if not wanted or self._deciding.now_s() >= give_up_s:
            return False
        if not image.holder.trouble:
            log.warning("open_waits", image=str(image.name), why=str(error))
        image.holder.trouble = str(error)
        return True

    # Given back

    def _give_back(self, image: OpenImage, held: Held, why: str) -> None:
        """End an open that came to nothing, and let others have the lease."""
        log.info("image_refused", image=str(image.name), why=why)
        self._hear(image, events.Fail(why))
        self._let_go(held)

    def _let_go(self, held: Held) -> None:
        def failed(error: HciError) -> None:
            # Any other error says that the lease is another's, or ours anew.
            if isinstance(error, EtcdError):
                self._deciding.after(RELEASE_RETRY_S, lambda: self._let_go(held))

        self._calls.later(lambda: self._catalog.release(held, clean=False), nothing_more, failed)

    def _let_go_unheard(self, image: ImageId) -> None:
        """Give a lease back that etcd took from us unheard: nobody else could open the image.

        Where it was asked for again meanwhile, that takes the place of the one unheard.
        """

        def found(held: Held | None) -> None:
            self._unheard.discard(image)
            if held is not None and image not in self._images:
                self._let_go(held)

        def failed(error: HciError) -> None:
            if isinstance(error, EtcdError):
                self._deciding.after(RELEASE_RETRY_S, lambda: self._let_go_unheard(image))
            else:
                self._unheard.discard(image)

        self._calls.later(lambda: self._own_lease(image), found, failed)

    def _own_lease(self, image: ImageId) -> Held | None:
        """Return how this process holds an image by what etcd says, or None where it does not."""
        etcd_lease = self._sessions.lease
        lease = self._catalog.lease_of(image)
        if lease is None or lease.record.holder != self._holder_id:
            return None
        return Held(self._catalog.image(image), lease.record, etcd_lease)

    def release(self, image: OpenImage, clean: bool) -> None:
        """Give the lease back, also where etcd is away for a while: we keep it alive meanwhile."""
        assert image.held is not None
        held = image.held

        def release() -> None:
            try:
                self._catalog.release(held, clean=clean)
            except RecordChanged as error:
                # By ourselves, in a change whose answer was lost or came after all, or the lease
                # was taken again meanwhile.
                found = self._catalog.image(image.image)
                own = (held.record.epoch, held.record.holder)
                if (found.record.epoch, found.record.holder) != own:
                    raise
                moved = isinstance(error, LeaseMoved)
                etcd_lease = self._sessions.lease if moved else held.etcd_lease
                self._catalog.release(Held(found, held.lease, etcd_lease), clean=False)

        def released(_result: None) -> None:
            log.info("image_released", image=str(image.name), clean=clean)
            self._hear(image, events.Released())

        def failed(error: HciError) -> None:
            log.warning("image_release_failed", image=str(image.name), why=str(error))
            if isinstance(error, EtcdError):
                self._deciding.after(RELEASE_RETRY_S, lambda: self.release(image, clean))
            else:
                # The lease is another's already, or the image is gone.
                self._hear(image, events.Released())

        self._calls.later(release, released, failed)
