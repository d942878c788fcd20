"""`Session`: an etcd lease kept alive, and how long it is certain to live.

    state     event                                       next
    alive     renewed: deadline moves on                  alive
    alive     etcd unreachable: asked again soon          alive; `remaining_s` runs down to 0
    alive     etcd says that the lease is gone            lost, `on_lost` is called once
    any       closed                                      closed, the lease is revoked

Time counts from *sending* a renewal, on a clock that runs through suspend, so that the lease never
ends in etcd before it ends here. A deadline that passed is not the end: the lease may still be
there, and the next renewal tells. Whoever must be sure asks `remaining_s` at the moment it acts.
"""

import threading
import time
from collections.abc import Callable

from etcd.errors import ClientClosed, EtcdError, LeaseNotFound
from etcd.interface import Etcd

TTL_S = 10
"""Lease time: how long a lost host blocks what it held. The design's stalls are counted from it."""

RENEWALS_PER_TTL = 3
RETRIES_PER_TTL = 20
"""Pauses between renewals, and between attempts while etcd does not answer."""


def boottime_s() -> float:
    """Return the seconds of a clock that runs through suspend and never jumps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Session:
    """An etcd lease with a thread that renews it. `lease` is its id, for `Put`s.

    Raises EtcdUnavailable where the lease cannot be taken. `on_renewed` gets each new deadline and
    `on_lost` is called once when etcd says that the lease is gone; both run on the session's
    thread, must be quick, and must not close the session.
    """

    def __init__(
        self,
        etcd: Etcd,
        *,
        on_lost: Callable[[], None],
        on_renewed: Callable[[float], None] = lambda _deadline_s: None,
        ttl_s: int = TTL_S,
        clock_s: Callable[[], float] = boottime_s,
    ) -> None:
        self._etcd = etcd
        self._on_lost = on_lost
        self._on_renewed = on_renewed
        self._ttl_s = ttl_s
        self._clock_s = clock_s
        self._closed = threading.Event()
        self._lost = False
        sent_s = clock_s()
        self.lease = etcd.grant_lease(ttl_s)
        self._deadline_s = sent_s + ttl_s
        self._thread = threading.Thread(
            target=self._run, name=f"etcd-lease {self.lease:x}", daemon=True
        )

    def start(self) -> "Session":
        """Begin to renew the lease."""
        self._thread.start()
        return self

    @property
    def deadline_s(self) -> float:
        """Until when the lease certainly lives, on the session's clock; in the past once lost."""
        return self._deadline_s

    def remaining_s(self) -> float:
        """Return how long the lease certainly lives on: 0 where that is over."""
        return max(0.0, self._deadline_s - self._clock_s())

    @property
    def lost(self) -> bool:
        """Whether etcd said that the lease is gone. It never comes back; make a new session."""
        return self._lost

    def close(self) -> None:
        """Stop renewing and revoke the lease, which deletes its keys.

        Where etcd is not reachable the lease ends by itself.
        """
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
        self._deadline_s = self._clock_s()
        if not self._lost:
            try:
                self._etcd.revoke_lease(self.lease)
            except EtcdError:
                return

    def renew(self) -> bool:
        """Renew the lease now; return whether etcd answered that it lives on.

        Called by the session's thread. Raises LeaseNotFound, after `on_lost`, where it is gone.
        """
        sent_s = self._clock_s()
        try:
            ttl_s = self._etcd.refresh_lease(self.lease)
        except LeaseNotFound:
            self._lost = True
            self._deadline_s = min(self._deadline_s, sent_s)
            self._on_lost()
            raise
        except ClientClosed:
            raise
        except EtcdError:
            return False
        self._deadline_s = sent_s + min(ttl_s, self._ttl_s)
        self._on_renewed(self._deadline_s)
        return True

    def first_pause_s(self) -> float:
        """Return how long to wait before the first `turn`."""
        return self._ttl_s / RENEWALS_PER_TTL

    def turn(self) -> float | None:
        """Renew the lease once; return how long to wait before the next turn, None at the end."""
        try:
            renewed = self.renew()
        except (LeaseNotFound, ClientClosed):
            return None
        return self._ttl_s / (RENEWALS_PER_TTL if renewed else RETRIES_PER_TTL)

    def _run(self) -> None:
        pause_s: float | None = self.first_pause_s()
        while pause_s is not None and not self._closed.wait(pause_s):
            pause_s = self.turn()
