"""The configuration: the sections of one TOML file, parsed once into frozen dataclasses.

`hci.config_file` finds, reads and checks the file. Who has a `Config` may rely on all in it, but
for what the file names: that is opened by whoever uses it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Self, TypeVar

from hci.errors import ConfigError
from shard.scrub import ScrubLimits
from vmstore.healing import HealLimits
from vmstore.slowness import SlowLimits

T = TypeVar("T")

DEFAULT_ZONE = "default"
"""Sites without zones are one zone."""

DEFAULT_LOG_BYTES = 1 << 30
"""A node's write-ahead log. Bursts up to this size are written once, at the page cache's speed;
what is overwritten within it never reaches a shard file. Read back after a crash in about a second.
Its segments are created as they are needed."""

DEFAULT_POLL_US = 100
"""As long as a request of a guest that waits for each one takes between two of its steps."""


@dataclass(frozen=True)
class Endpoint:
    """A TCP address to listen at or connect to."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the endpoint of `HOST:PORT` or `[IPV6]:PORT`; raises ValueError with advice."""
        host, colon, port = text.rpartition(":")
        bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        if not colon or not bare or (":" in bare and bare == host):
            raise ValueError("must look like 127.0.0.1:7101 or [::1]:7101")
        if not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:
            raise ValueError("must end with a port from 1 to 65535")
        return cls(bare, int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class ClusterConfig:
    """What all members of a cluster share."""

    id: str
    """32 hex digits, drawn when the cluster is made; stores of other clusters are refused."""
    etcd: tuple[Endpoint, ...]


@dataclass(frozen=True)
class NodeConfig:
    """A storage node."""

    name: str
    data_dir: Path
    listen: Endpoint
    """Where gateways connect."""
    control: Endpoint
    """Where `hci` asks."""
    socket: Path | None
    """Where the gateway of the same host connects, so that its reads stay off the network."""
    host: str
    zone: str
    log_bytes: int
    metrics: Endpoint | None
    """Where Prometheus asks; None: nowhere."""
    poll_us: int = DEFAULT_POLL_US
    """How long its loop looks for requests before it sleeps, while they come as fast; 0: never."""


@dataclass(frozen=True)
class ClientLimits:
    """What NBD clients of a gateway may take; a client past its share is read later."""

    clients_max: int = 4096
    """Connections; more are closed as they come. A host's guests have a few disks each."""
    client_bytes_in_flight: int = 64 << 20
    """Two of the largest requests, or QEMU's sixteen at once of 4 MiB."""
    bytes_in_flight: int = 512 << 20
    """Of all clients. Each may have as much of it as is left free: one half, two a third each."""
    handshake_timeout_s: int = 30
    idle_timeout_s: int = 0
    """0: never. A guest may leave its disk alone for days."""


@dataclass(frozen=True)
class AccessRule:
    """Which clients may open which images; each is known by what its certificate says."""

    clients: tuple[str, ...]
    images: tuple[str, ...]
    read_only: bool


@dataclass(frozen=True)
class TlsConfig:
    """TLS for NBD clients of a gateway."""

    certificate: Path
    key: Path
    client_ca: Path | None
    """Clients must have a certificate that one of these authorities has signed; None: need none."""
    tcp: str
    """For clients over TCP: required, optional or off."""
    socket: str
    """For those over the unix socket, which its owner and mode guard anyway."""
    access: tuple[AccessRule, ...]
    """None: who is let in may open everything."""


@dataclass(frozen=True)
class GatewayConfig:
    """A gateway."""

    name: str
    host: str
    control: Endpoint
    nbd_socket: Path
    nbd_listen: Endpoint | None
    run_dir: Path
    """Sockets and the lock that only this gateway's death frees; need not survive a reboot."""
    metrics: Endpoint | None
    limits: ClientLimits = field(default_factory=ClientLimits)
    read_only: tuple[str, ...] = ()
    """Patterns of the names of images that nobody may write to here."""
    tls: TlsConfig | None = None
    poll_us: int = DEFAULT_POLL_US
    """How long its loop looks for requests and answers before it sleeps; 0: never."""

    def is_read_only(self, image: str) -> bool:
        """Return whether clients of this gateway may only read an image."""
        return any(fnmatchcase(image, pattern) for pattern in self.read_only)


@dataclass(frozen=True)
class ArbiterConfig:
    """A thin arbiter, on a host that is none of the nodes it decides on."""

    name: str
    data_dir: Path
    """A few files; what they hold must outlive the host's other disks no less than etcd's data."""
    listen: Endpoint
    """Where gateways ask for votes, and `hci` how it is."""
    host: str
    metrics: Endpoint | None


@dataclass(frozen=True)
class DevConfig:
    """What `hci dev` needs to know besides the members."""

    etcd_peer: Endpoint
    """etcd listens here for other members of its own kind, of which there are none."""
    etcd_data_dir: Path
    log_dir: Path
    run_dir: Path
    """Short enough for sockets, whatever the cluster's folder is called."""
    pool: str
    """Created when the cluster starts for the first time."""


@dataclass(frozen=True)
class Config:
    """The whole file.

    `heal` and `scrub` are how much of the hosts these may take, `slow` when a node is too slow.
    """

    path: Path
    cluster: ClusterConfig
    nodes: Mapping[str, NodeConfig]
    gateways: Mapping[str, GatewayConfig]
    arbiters: Mapping[str, ArbiterConfig]
    dev: DevConfig | None
    heal: HealLimits = field(default_factory=HealLimits)
    slow: SlowLimits = field(default_factory=SlowLimits)
    scrub: ScrubLimits = field(default_factory=ScrubLimits)

    def node(self, name: str) -> NodeConfig:
        """Return the node's section. Raises ConfigError where the file has none."""
        return self._member("node", self.nodes, name)

    def gateway(self, name: str) -> GatewayConfig:
        """Return the gateway's section. Raises ConfigError where the file has none."""
        return self._member("gateway", self.gateways, name)

    def arbiter(self, name: str) -> ArbiterConfig:
        """Return the arbiter's section. Raises ConfigError where the file has none."""
        return self._member("arbiter", self.arbiters, name)

    def _member(self, kind: str, members: Mapping[str, T], name: str) -> T:
        if name not in members:
            known = ", ".join(sorted(members)) or f"it has no [{kind}.…] at all"
            raise ConfigError(f"no [{kind}.{name}] in it (known: {known})", self.path)
        return members[name]
