"""From a configuration to the cluster's catalogue in etcd, and to its arbiters."""

from collections.abc import Iterator
from contextlib import contextmanager

from arbiter.client import ArbiterClient
from etcd.client import EtcdClient
from hci.config import Config, Endpoint
from vmstore.catalog import Catalog
from vmstore.errors import NoCluster, OtherCluster

ETCD_PATIENCE_S = 6.0
"""How long a command asks an etcd again that is there, and busy or without a leader: three times
as long as a call may take, and longer than it takes to choose another one."""


@contextmanager
def catalog(config: Config, *, may_be_empty: bool = False) -> Iterator[Catalog]:
    """Give the catalogue of the configured cluster; its connection ends with the block.

    Raises OtherCluster where etcd holds another one, whose records must be neither shown nor
    changed; and NoCluster where it holds none, unless it `may_be_empty`, or is known to have lost
    its history: what that refuses says so itself. This and calls on it raise
    `etcd.errors.EtcdUnavailable` where etcd does not answer.
    """
    endpoints = [str(endpoint) for endpoint in config.cluster.etcd]
    client = EtcdClient(endpoints, patience_s=ETCD_PATIENCE_S)
    try:
        records = Catalog(client)
        _check(records, config, may_be_empty=may_be_empty)
        yield records
    finally:
        client.close()


def _check(records: Catalog, config: Config, *, may_be_empty: bool) -> None:
    found = records.stored_cluster()
    if found is None:
        if not may_be_empty and records.lost() is None:
            raise NoCluster
    elif found.record.id != config.cluster.id:
        raise OtherCluster(config.cluster.id, found.record.id)


@contextmanager
def arbiter_client(
    name: str, address: Endpoint | str, *, deadline_s: float
) -> Iterator[ArbiterClient]:
    """Give a client of an arbiter; its connection ends with the block.

    Calls on it raise `arbiter.errors.ArbiterUnreachable` where it does not answer.
    """
    client = ArbiterClient(name, str(address), deadline_s=deadline_s)
    try:
        yield client
    finally:
        client.close()
