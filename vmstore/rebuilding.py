"""Carrying out a plan of `vmstore.recovering` in etcd.

    1  etcd is marked as lost, with the number of this recovery     nothing begins by its records
    2  record after record is written, each as long as the mark     killed here, a next run goes on:
       is ours and what is replaced is what was read                it keeps what has its number
    3  the cluster's count of recoveries rises, the mark goes       nodes and gateways believe etcd

Nobody but holders of images changes anything meanwhile, and their changes are told by the records
that they replace.
"""

from collections.abc import Callable, Mapping

from etcd import keys
from etcd.interface import (
    Compare,
    Delete,
    Etcd,
    KeyAbsent,
    KeyValue,
    ModRevisionEquals,
    Operation,
    Put,
    ValueEquals,
)
from etcd.records import ClusterRecord, LostRecord
from vmstore.errors import RecoveryRefused
from vmstore.history import decoded
from vmstore.recovering import Plan, Write
from vmstore.stored import commit, put_found
from vmstore.told import Sources

AGAIN = "something changed meanwhile; run `hci cluster recover` again, it goes on where it was"


def carry_out(
    etcd: Etcd, sources: Sources, plan: Plan, progress: Callable[[float], None] = lambda _: None
) -> None:
    """Write what a plan says.

    Raises RecoveryRefused where something changed since it was made, EtcdUnavailable and
    OutcomeUnknown; after each of them, and after a kill, another run goes on.
    """
    mark = _begin(etcd, sources.now, plan)
    for done, write in enumerate(plan.writes):
        _write(etcd, sources.now, write, mark)
        progress((done + 1) / (len(plan.writes) + 1))
    _end(etcd, sources, plan, mark)
    progress(1.0)


def _begin(etcd: Etcd, now: Mapping[str, KeyValue], plan: Plan) -> Put:
    found = now.get(keys.LOST)
    why = plan.why[0] if plan.why else "a recovery was asked for"
    record = LostRecord(by="hci cluster recover", why=why, recovery=plan.recovery)
    if found is not None:
        marked = decoded(LostRecord, keys.LOST, {keys.LOST: found.value})
        if marked is not None and marked.recovery == plan.recovery:
            return Put(keys.LOST, found.value)
        if marked is not None:
            record = LostRecord(by=marked.by, why=marked.why, recovery=plan.recovery)
    put = Put(keys.LOST, record.encode())
    # A recovery that ended since is told by the cluster's record.
    compares = [*_as_read(now, keys.LOST), *_as_read(now, keys.CLUSTER)]
    if commit(etcd, compares, [put], put_found(etcd, put)) is None:
        raise RecoveryRefused(AGAIN)
    return put


def _write(etcd: Etcd, now: Mapping[str, KeyValue], write: Write, mark: Put) -> None:
    compares: list[Compare] = [ValueEquals(mark.key, mark.value)]
    for key in write.compared:
        compares += _as_read(now, key)
    operations: list[Operation] = [
        Delete(key) if value is None else Put(key, value) for key, value in write.values.items()
    ]

    def found() -> int | None:
        for key, value in write.values.items():
            item = etcd.get(key)
            if (item.value if item is not None else None) != value:
                return None
        return 1

    if commit(etcd, compares, operations, found) is None:
        raise RecoveryRefused(AGAIN)


def _end(etcd: Etcd, sources: Sources, plan: Plan, mark: Put) -> None:
    found = sources.now.get(keys.CLUSTER)
    cluster = ClusterRecord(id=sources.cluster)
    if found is not None:
        cluster = ClusterRecord.decode(found.key, found.value)
    record = ClusterRecord(
        id=cluster.id, format=cluster.format, recoveries=plan.recovery, extra=cluster.extra
    )
    put = Put(keys.CLUSTER, record.encode())
    # A gateway that started meanwhile may have made an empty one.
    item = etcd.get(keys.CLUSTER)
    compares: list[Compare] = [ValueEquals(mark.key, mark.value)]
    if item is None:
        compares.append(KeyAbsent(keys.CLUSTER))
    else:
        compares.append(ModRevisionEquals(keys.CLUSTER, item.mod_revision))
    operations: list[Operation] = [put, Delete(keys.LOST)]
    if commit(etcd, compares, operations, put_found(etcd, put)) is None:
        raise RecoveryRefused(AGAIN)


def _as_read(now: Mapping[str, KeyValue], key: str) -> list[Compare]:
    item = now.get(key)
    if item is None:
        return [KeyAbsent(key)]
    return [ModRevisionEquals(key, item.mod_revision), ValueEquals(key, item.value)]
