"""What persons ask of the simulated cluster: to resize, scrub or delete its image."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING

from etcd import keys
from etcd.errors import EtcdError
from etcd.scrubs import ScrubRecord
from shard.errors import HciError
from shard.ids import ImageId
from tests.sim.clock import Process
from tests.sim.cluster_state import Door, Path
from tests.sim.shape import IMAGE, POOL, SHARD_BYTES
from vmstore.catalog import Catalog
from vmstore.errors import RecordChanged
from vmstore.names import ImageName

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster


class Operator:
    """A person at a machine of her own, who reaches etcd as long as it is up."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def delete_image(self) -> bool:
        """Delete the image, as an operator; return whether that was done."""
        cluster = self._cluster
        operator = Process("operator")
        catalog = Catalog(Door(cluster.state, Path(), operator))
        done: list[object] = []
        cluster.clock.start(
            operator, lambda: catalog.delete_image(ImageName(POOL, IMAGE)), done.append
        )
        cluster.run_for(1.0)
        return bool(done)

    def resize(self, gateway: int, shards: int) -> Future[None] | None:
        """Have the image resized by a gateway, if it runs; return how it goes."""
        cluster = self._cluster
        process = cluster.gateways[gateway]
        if process is None or not process.started:
            return None
        cluster.say(f"{process.name} resizes the image to {shards} shards")
        return process.resize(ImageName(POOL, IMAGE), shards * SHARD_BYTES)

    def make_image_of_id(self, image: ImageId) -> str:
        """Try to make an image of a certain id, which chance gave twice; say how it went."""
        cluster = self._cluster
        operator = Process("operator")
        catalog = Catalog(Door(cluster.state, Path(), operator), lambda: image)
        outcome: list[str] = []

        def make() -> str:
            try:
                catalog.create_image(ImageName(POOL, "another"), SHARD_BYTES)
            except RecordChanged:
                return "refused"
            return "made"

        cluster.clock.start(operator, make, outcome.append)
        cluster.run_for(2.0, lambda: bool(outcome))
        return outcome[0] if outcome else "no answer"

    def ask_for_scrub(self) -> None:
        """Ask for a scrub as a person does; one that is under way is that."""
        cluster = self._cluster
        now_ms = int(cluster.clock.now_s * 1000) + 1
        operator = Process("operator")
        catalog = Catalog(Door(cluster.state, Path(), operator))

        def ask() -> None:
            try:
                catalog.ask_for_scrub(cluster.image, now_ms)
            except (HciError, EtcdError) as error:
                cluster.say(f"  operator: {error}")

        cluster.clock.start(operator, ask)

    def scrub_record(self) -> ScrubRecord:
        """Return how its scrub stands."""
        cluster = self._cluster
        item = cluster.state.memory.get(keys.scrub(cluster.image))
        if item is None:
            return ScrubRecord(image=cluster.image)
        return ScrubRecord.decode(item.key, item.value)

    def is_scrubbed(self) -> bool:
        """Whether no scrub waits or is under way, and nothing waits to be read again."""
        found = self.scrub_record()
        return not (found.times.is_asked or found.times.is_under_way or found.missed_end)
