"""Hearing all nodes and arbiters of a cluster whose records in etcd are to be rebuilt.

Where they are is known from the configuration, from what is left in etcd, and from the copies that
the nodes keep: each node that answers may tell of others.
"""

import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from arbiter import arbiter_pb2 as arbiter_pb
from arbiter.errors import ArbiterError
from etcd import keys
from etcd.errors import RecordError
from etcd.interface import Etcd, KeyValue
from etcd.records import ArbiterRecord, ClusterRecord, NodeRecord
from hci.config import Config
from hci.connect import arbiter_client
from hci.control import NodeClient
from hci.errors import ControlError
from hci.known import member_of
from shard.errors import HciError
from shard.ids import ImageId, image_id
from vmstore.errors import OtherCluster
from vmstore.history import Member
from vmstore.recovering import Plan, plan
from vmstore.told import Sources, Voted, Witness

ASK_DEADLINE_S = 5.0


def hear(config: Config, etcd: Etcd, also: Sequence[str] = ()) -> Sources:
    """Ask everybody who can be found. `also` are control addresses of further nodes.

    Raises EtcdUnavailable, and OtherCluster where etcd holds another cluster.
    """
    now = {item.key: item for item in etcd.get_prefix(keys.PREFIX).items}
    _check_cluster(config, now)
    members: dict[str, Member] = {}
    away: dict[str, str] = {}
    asked: set[str] = set()
    known = {name: str(node.control) for name, node in config.nodes.items()}
    known |= {address: address for address in also}
    known |= _node_addresses(now)
    while left := {name: at for name, at in known.items() if at not in asked}:
        asked |= set(left.values())
        with ThreadPoolExecutor(min(len(left), 32)) as pool:
            answers = list(pool.map(lambda each: _ask(config, *each), left.items()))
        for name, answer in zip(left, answers, strict=True):
            if isinstance(answer, Member):
                members[answer.name] = answer
                known |= {
                    other: at
                    for other, at in _node_addresses(answer.known.records).items()
                    if other not in known
                }
            else:
                away[name] = answer
    witnesses = _witnesses(config, [now, *(each.known.records for each in members.values())])
    silent = {name: why for name, why in away.items() if name not in members}
    return Sources(config.cluster.id, members, witnesses, silent, now)


def make_plan(sources: Sources) -> Plan:
    """Return what a recovery from these sources writes."""
    return plan(sources, secrets.token_hex(16))


def _check_cluster(config: Config, now: Mapping[str, KeyValue]) -> None:
    found = now.get(keys.CLUSTER)
    if found is not None:
        record = ClusterRecord.decode(found.key, found.value)
        if record.id != config.cluster.id:
            raise OtherCluster(config.cluster.id, record.id)


def _ask(config: Config, name: str, address: str) -> Member | str:
    try:
        with NodeClient(name, address, deadline_s=ASK_DEADLINE_S) as client:
            status = client.status()
            if status.cluster_id != config.cluster.id:
                return f"a node of cluster {status.cluster_id} answers at {address}"
            return member_of(client.known())
    except (ControlError, HciError) as error:
        return str(error)


def _node_addresses(records: Mapping[str, KeyValue]) -> dict[str, str]:
    found = {}
    for key, item in records.items():
        if key.startswith(keys.NODES):
            try:
                record = NodeRecord.decode(key, item.value)
            except RecordError:
                continue
            found[record.name] = record.control
    return found


def _witnesses(config: Config, copies: Sequence[Mapping[str, KeyValue]]) -> dict[str, Witness]:
    addresses = {name: str(own.listen) for name, own in config.arbiters.items()}
    for copy in copies:
        for key, item in copy.items():
            if key.startswith(keys.ARBITERS):
                try:
                    record = ArbiterRecord.decode(key, item.value)
                except RecordError:
                    continue
                addresses.setdefault(record.name, record.address)
    found = {}
    for name, address in addresses.items():
        try:
            with arbiter_client(name, address, deadline_s=ASK_DEADLINE_S) as client:
                status, images = client.status(), client.known()
        except ArbiterError:
            continue
        if (status.cluster_id, status.name) == (config.cluster.id, name):
            voted = {ImageId(image_id(each.image_id)): _voted(each) for each in images}
            found[name] = Witness(name, status.arbiter_id, status.start_counter, voted)
    return found


def _voted(told: arbiter_pb.KnownImage) -> Voted:
    return Voted(told.epoch, tuple((each.generation, frozenset(each.nodes)) for each in told.sets))
