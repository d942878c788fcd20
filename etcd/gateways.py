"""`GatewayRecord`: a gateway that runs, and where `hci` asks it from any host."""

from dataclasses import dataclass
from typing import Self

from etcd import keys
from etcd.fields import Fields, Json, not_empty
from etcd.records import Record
from shard.ids import holder_id, node_name


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayRecord(Record):
    """Bound to the gateway's etcd lease: a gateway that has no record is not known to run."""

    name: str
    host: str
    control: str
    """HOST:PORT of its control service."""
    holder: str
    """The process: as in the leases of the images that it has open."""

    @property
    def key(self) -> str:
        """Return where the record stands."""
        return keys.gateway(self.name)

    def _fields(self) -> dict[str, Json]:
        return {
            "name": self.name,
            "host": self.host,
            "control": self.control,
            "holder": self.holder,
        }

    @classmethod
    def _take(cls, fields: Fields) -> Self:
        return cls(
            name=fields.text("name", node_name),
            host=fields.text("host", not_empty),
            control=fields.text("control", not_empty),
            holder=fields.text("holder", holder_id),
            extra=fields.rest(),
        )
