"""From a configuration to the cluster's catalogue in etcd, and to its arbiters."""

from collections.abc import Iterator
from contextlib import contextmanager

from arbiter.client import ArbiterClient
from etcd.client import EtcdClient
from hci.config import Config, Endpoint
from vmstore.catalog import Catalog

ETCD_PATIENCE_S = 6.0
"""How long a command asks an etcd again that is there, and busy or without a leader: three times
as long as a call may take, and longer than it takes to choose another one."""


@contextmanager
def catalog(config: Config) -> Iterator[Catalog]:
    """Give the catalogue of the cluster; its connection ends with the block.

    Calls on it raise `etcd.errors.EtcdUnavailable` where etcd does not answer.
    """
    endpoints = [str(endpoint) for endpoint in config.cluster.etcd]
    client = EtcdClient(endpoints, patience_s=ETCD_PATIENCE_S)
    try:
        yield Catalog(client)
    finally:
        client.close()


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
