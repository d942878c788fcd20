"""`Granter`: makes the steps of `vmstore.granting`, each by asking etcd or an arbiter."""

from typing import Protocol

from arbiter.client import Voter
from arbiter.exchange import Addressee
from etcd.records import ArbiterRecord
from vmstore.arbiters import ArbiterRecords
from vmstore.granting import Commit, Confirm, Found, Look, Prepare, Step
from vmstore.holding import Held


class Voters(Protocol):
    """Where arbiters are asked."""

    def at(self, name: str, address: str) -> Voter:
        """Return the arbiter that has this name and address."""

    def close(self) -> None:
        """End all connections."""


class Granter:
    """Makes the steps of changes of membership. Safe to use from several threads."""

    def __init__(self, records: ArbiterRecords, voters: Voters) -> None:
        self._records = records
        self._voters = voters

    def make(self, step: Step) -> Found | Held | int:
        """Make one step, waiting for it; return its result. Raises what it met."""
        match step:
            case Look(image, pool):
                return self._look(step)
            case Prepare(arbiter, image, changes, known, wanted):
                to = Addressee(arbiter.id, arbiter.start_counter, changes)
                return self._voter(arbiter).prepare(to, image, known, wanted)
            case Commit(held, after, grant, pool):
                as_long_as = pool.unchanged if pool is not None else ()
                return self._records.change(held, after, grant=grant, as_long_as=as_long_as)
            case Confirm(arbiter, image, changes, stated):
                to = Addressee(arbiter.id, arbiter.start_counter, changes)
                return self._voter(arbiter).confirm(to, image, stated)

    def _look(self, look: Look) -> Found:
        image = self._records.image(look.image)
        pool = self._records.pool(look.pool)
        name = pool.record.arbiter
        arbiter = self._records.arbiter(name).record if name is not None else None
        return Found(image, pool, arbiter)

    def _voter(self, arbiter: ArbiterRecord) -> Voter:
        return self._voters.at(arbiter.name, arbiter.address)
