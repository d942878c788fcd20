"""Whether a node whose store was set back may go on, and how long it waits to find out.

What etcd says of the store is compared in `vmstore.set_back`. Here the cluster is asked for the
rest: whether another run may live with the store, and whether the other nodes serve. Each is given
its time, and when that is over the process ends. Opening the store anew is the daemon's.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from etcd.records import NodeRecord
from hci import control
from hci import control_pb2 as pb
from hci.daemon import Ending
from hci.errors import ControlError
from vmstore.catalog import Catalog
from vmstore.errors import StoreBehind, StoreCopied
from vmstore.set_back import may_run_elsewhere, only_here

COPIED_S = 20.0
"""How long a store that was set back waits for the end of the etcd lease of whoever ran with it:
twice what that lasts. One that goes on is of a process that runs, with a copy of the store."""

ALONE_S = 10.0
"""How long it waits for another node from which it could be healed, which may be starting too."""

ASK_DEADLINE_S = 2.0


class SetBackJudge:
    """Says of one node's store whether it may go on, and remembers since when it may not."""

    def __init__(self, catalog: Catalog, ending: Ending) -> None:
        self._catalog = catalog
        self._ending = ending
        self._copied_since_s = 0.0
        self._alone_since_s = 0.0

    def waits(self, known: NodeRecord, own: NodeRecord) -> str:
        """Say why a store that was set back may not go on yet; empty: it may, as a new instance.

        `known` is what etcd has seen of it, `own` what it is. Raises EtcdError. Ends the process
        where it must not serve.
        """
        behind = StoreBehind(own.name, known.start_counter, own.start_counter)
        if may_run_elsewhere(self._catalog.alive().get(own.name), own):
            self._copied_since_s = self._copied_since_s or time.monotonic()
            if time.monotonic() - self._copied_since_s > COPIED_S:
                self._ending.fail(str(StoreCopied(own.name, own.start_counter)))
            return str(behind)
        images = [entry.image.record for entry in self._catalog.images()]
        lonely = only_here(images, own.name, self._serving(own.name))
        if not lonely:
            return ""
        self._alone_since_s = self._alone_since_s or time.monotonic()
        trouble = str(behind.where_alone(lonely))
        if time.monotonic() - self._alone_since_s > ALONE_S:
            self._ending.fail(trouble)
        return trouble

    def _serving(self, own: str) -> set[str]:
        """The other nodes that serve now. One that died counts as alive in etcd for a while yet."""
        nodes = self._catalog.nodes()
        others = [name for name in self._catalog.alive() if name != own and name in nodes]

        def serves(name: str) -> bool:
            with (
                suppress(ControlError),
                control.NodeClient(name, nodes[name].control, deadline_s=ASK_DEADLINE_S) as client,
            ):
                return client.status().state == pb.NodeStatus.STATE_SERVING
            return False

        with ThreadPoolExecutor(max(len(others), 1)) as pool:
            return {
                name for name, is_so in zip(others, pool.map(serves, others), strict=True) if is_so
            }
