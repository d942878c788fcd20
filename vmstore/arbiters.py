"""Thin arbiters in the cluster's records: which there are, and which pools they vote for.

A name stands for one durable record for ever, told by its random id, as a node's name does for its
store. An arbiter that is replaced is retired: it comes back under a new name, empty, or not at all.
"""

from dataclasses import replace

from etcd import keys
from etcd.interface import Compare, KeyAbsent, Put
from etcd.records import AliveRecord, ArbiterRecord, PoolRecord
from shard.ids import arbiter_name, pool_name
from vmstore.errors import (
    ArbiterRetired,
    ArbiterRolledBack,
    ForeignArbiter,
    RecordChanged,
    UnknownArbiter,
    UnknownPool,
)
from vmstore.holding import INTACT, Holding
from vmstore.stored import Stored, commit, put_found, read, stored


class ArbiterRecords(Holding):
    """Reads and changes the records of arbiters, and of pools as far as an arbiter matters.

    All methods raise EtcdUnavailable, changing ones also OutcomeUnknown and RecordChanged.
    """

    def pool(self, name: str) -> Stored[PoolRecord]:
        """Return a pool. Raises BadName, UnknownPool."""
        found = read(self._etcd, PoolRecord, keys.pool(pool_name(name)))
        if found is None:
            self.check_history()
            raise UnknownPool(name)
        return found

    def arbiters(self) -> dict[str, ArbiterRecord]:
        """Return all arbiters that were ever registered, by name."""
        return {
            item.key.removeprefix(keys.ARBITERS): stored(ArbiterRecord, item).record
            for item in self._etcd.get_prefix(keys.ARBITERS).items
        }

    def voting(self) -> set[str]:
        """Return the names of the arbiters that run and reach etcd."""
        found = self._etcd.get_prefix(keys.VOTING).items
        return {item.key.removeprefix(keys.VOTING) for item in found}

    def arbiter(self, name: str) -> Stored[ArbiterRecord]:
        """Return an arbiter. Raises BadName, UnknownArbiter, ArbiterRetired."""
        found = read(self._etcd, ArbiterRecord, keys.arbiter(arbiter_name(name)))
        if found is None:
            raise UnknownArbiter(name)
        if found.record.retired:
            raise ArbiterRetired(name)
        return found

    def check_arbiter(self, record: ArbiterRecord) -> Stored[ArbiterRecord] | None:
        """Return what is registered under an arbiter's name, which may be nothing.

        Raises ForeignArbiter, ArbiterRolledBack and ArbiterRetired: it must not vote then, and what
        it knows says nothing about etcd.
        """
        former = read(self._etcd, ArbiterRecord, record.key)
        if former is not None:
            known = former.record
            if known.retired:
                raise ArbiterRetired(record.name)
            if known.id != record.id:
                raise ForeignArbiter(record.name, known.id, record.id)
            if known.start_counter > record.start_counter:
                raise ArbiterRolledBack(record.name, known.start_counter, record.start_counter)
        return former

    def announce_arbiter(self, record: ArbiterRecord, etcd_lease: int) -> None:
        """Register an arbiter that started, and say that it runs as long as the lease lives.

        Raises what `check_arbiter` raises.
        """
        former = self.check_arbiter(record)
        compares: tuple[Compare, ...] = (KeyAbsent(record.key),)
        if former is not None:
            compares = former.unchanged
            record = replace(record, extra={**former.record.extra, **record.extra})
        runs = AliveRecord(start_counter=record.start_counter)
        put = Put(record.key, record.encode())
        operations = [put, Put(keys.voting(record.name), runs.encode(), etcd_lease)]
        if commit(self._etcd, compares, operations, put_found(self._etcd, put)) is None:
            raise RecordChanged(f"arbiter {record.name}")

    def retire_arbiter(self, name: str) -> None:
        """Say that an arbiter was replaced. Raises UnknownArbiter, ArbiterRetired."""
        former = self.arbiter(name)
        self._put(former, replace(former.record, retired=True), f"arbiter {name}")

    def assign_arbiter(
        self, pool: Stored[PoolRecord], arbiter: Stored[ArbiterRecord], *, filled: bool
    ) -> Stored[PoolRecord]:
        """Have an arbiter vote for a pool's images; while it is not `filled` it grants nothing."""
        record = replace(pool.record, arbiter=arbiter.record.name, filled=filled)
        put = Put(pool.key, record.encode())
        compares = [*pool.unchanged, *arbiter.unchanged, INTACT]
        revision = commit(self._etcd, compares, [put], put_found(self._etcd, put))
        if revision is None:
            self.check_history()
            raise RecordChanged(f"pool {record.name} or arbiter {arbiter.record.name}")
        return Stored(put.key, record, put.value, revision)

    def _put(self, former: Stored[ArbiterRecord], record: ArbiterRecord, what: str) -> None:
        put = Put(former.key, record.encode())
        if commit(self._etcd, former.unchanged, [put], put_found(self._etcd, put)) is None:
            raise RecordChanged(what)
