"""From a configuration to the cluster's catalogue in etcd."""

from collections.abc import Iterator
from contextlib import contextmanager

from etcd.client import EtcdClient
from hci.config import Config
from vmstore.catalog import Catalog


@contextmanager
def catalog(config: Config) -> Iterator[Catalog]:
    """Give the catalogue of the cluster; its connection ends with the block.

    Calls on it raise `etcd.errors.EtcdUnavailable` where etcd does not answer.
    """
    client = EtcdClient([str(endpoint) for endpoint in config.cluster.etcd])
    try:
        yield Catalog(client)
    finally:
        client.close()
