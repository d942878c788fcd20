"""The configuration: one TOML file, parsed once into frozen dataclasses.

A host's file holds its own members only; that of a cluster on one machine (`hci dev`) holds all of
them. A key that is not known is refused, with its full name and the names known in its place, so
that a slip of the pen is never a silent default. Nothing here opens what the file names.
"""

import os
import re
import socket
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Self, TypeVar

from hci.errors import ConfigError
from shard import geometry, ids
from shard.errors import HciError
from shard.scrub import ScrubLimits
from vmstore.healing import HealLimits
from vmstore.slowness import SlowLimits

T = TypeVar("T")

SYSTEM_CONFIG = Path("/etc/hci/hci.toml")

DEFAULT_ZONE = "default"
"""Sites without zones are one zone."""

DEFAULT_LOG_BYTES = 1 << 30
"""A node's write-ahead log. Bursts up to this size are written once, at the page cache's speed;
what is overwritten within it never reaches a shard file. Read back after a crash in about a second.
Its segments are created as they are needed."""

SMALLEST_LOG_BYTES = 16 << 20
"""Below this a few of the largest requests (32 MiB, cut into shards) would fill the log at once."""

SMALLEST_CLIENT_BYTES = 1 << 20
"""Less would have a client's sequential requests wait for each other."""

LARGEST_CLIENTS = 60_000
"""A daemon opens at most 65,536 files, a few of them for nodes and etcd."""

SLOWEST_HEAL = 1 << 20
"""Slower heals would hold a fetch back for more than a second."""

LONGEST_SOCKET_PATH = 107
"""Bytes that fit into `sun_path` beside its final NUL (unix(7))."""


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


def default_dev_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of the cluster that `hci dev start` makes when it is given none.

    Raises ConfigError for a user without a home.
    """
    data_home = environ.get("XDG_DATA_HOME")
    if data_home:
        return Path(data_home) / "hci-dev"
    try:
        return Path.home() / ".local" / "share" / "hci-dev"
    except RuntimeError as error:
        raise ConfigError(
            "this user has no home folder: set HOME, or give a folder to `hci dev start` and "
            "its hci.toml to other commands, by --config or HCI_CONFIG"
        ) from error


def find(given: Path | None = None, environ: Mapping[str, str] = os.environ) -> Path:
    """Return the file that says which cluster is meant.

    That is `given` (--config), else HCI_CONFIG, else /etc/hci/hci.toml, else the default dev
    cluster's. The first two are meant by somebody, so they are returned even if they do not exist.
    """
    if given is not None:
        return given
    if environ.get("HCI_CONFIG"):
        return Path(environ["HCI_CONFIG"])
    for path in (SYSTEM_CONFIG, default_dev_dir(environ) / "hci.toml"):
        if path.exists():
            return path
    raise ConfigError(
        "no cluster is configured here: give --config FILE, set HCI_CONFIG, "
        "or start a cluster on this machine with `hci dev start`"
    )


def load(path: Path) -> Config:
    """Read and check the file. Raises ConfigError with one line that names file and key."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", path) from error
    return parse(content.decode("utf-8", "replace"), path)


def parse(text: str, path: Path) -> Config:
    """Check the text of a configuration; `path` is for messages and relative to nothing."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"is not valid TOML: {error}", path) from error
    top = _Table(path, "", values)
    cluster = _cluster(top.table("cluster"))
    nodes = {name: _node(name, table) for name, table in top.members("node").items()}
    gateways = {name: _gateway(name, table) for name, table in top.members("gateway").items()}
    arbiters = {name: _arbiter(name, table) for name, table in top.members("arbiter").items()}
    dev = _dev(top.table("dev")) if top.has("dev") else None
    heal = _heal(top.table("heal")) if top.has("heal") else HealLimits()
    slow = _slow(top.table("slow"), path) if top.has("slow") else SlowLimits()
    scrub = _scrub(top.table("scrub")) if top.has("scrub") else ScrubLimits()
    top.finish()
    return Config(path, cluster, nodes, gateways, arbiters, dev, heal, slow, scrub)


def _cluster(table: "_Table") -> ClusterConfig:
    cluster = ClusterConfig(
        id=table.take("id", _hex_32),
        etcd=table.take("etcd", _endpoints),
    )
    table.finish()
    return cluster


def _heal(table: "_Table") -> HealLimits:
    usual = HealLimits()
    limits = HealLimits(
        bytes_per_second=table.take("bytes_per_second", _rate, usual.bytes_per_second),
        shards_at_once=table.take("shards_at_once", _shards_at_once, usual.shards_at_once),
        share_percent=table.take("share_percent", _percent, usual.share_percent),
    )
    table.finish()
    return limits


def _slow(table: "_Table", path: Path) -> SlowLimits:
    usual = SlowLimits()
    limits = SlowLimits(
        report_ms=table.take("report_ms", _milliseconds, usual.report_ms),
        leave_behind_ms=table.take(
            "leave_behind_ms", _milliseconds_or_never, usual.leave_behind_ms
        ),
        for_s=float(table.take("for_s", _slow_seconds, int(usual.for_s))),
        back_after_s=float(table.take("back_after_s", _slow_seconds, int(usual.back_after_s))),
    )
    table.finish()
    if 0 < limits.leave_behind_ms < limits.report_ms:
        told = f"slow.leave_behind_ms = {limits.leave_behind_ms}: must be 0, or at least report_ms"
        raise ConfigError(told, path)
    return limits


def _scrub(table: "_Table") -> ScrubLimits:
    usual = ScrubLimits()
    limits = ScrubLimits(
        every_s=table.take("every", _every, usual.every_s),
        bytes_per_second=table.take("bytes_per_second", _rate, usual.bytes_per_second),
        share_percent=table.take("share_percent", _percent, usual.share_percent),
    )
    table.finish()
    return limits


def _node(name: str, table: "_Table") -> NodeConfig:
    node = NodeConfig(
        name=name,
        data_dir=table.take("data_dir", _path),
        listen=table.take("listen", _endpoint),
        control=table.take("control", _endpoint),
        socket=table.take("socket", _socket_path, None),
        host=table.take("host", _label, socket.gethostname()),
        zone=table.take("zone", _label, DEFAULT_ZONE),
        log_bytes=table.take("log_bytes", _log_bytes, DEFAULT_LOG_BYTES),
        metrics=table.take("metrics", _endpoint, None),
    )
    table.finish()
    return node


def _gateway(name: str, table: "_Table") -> GatewayConfig:
    gateway = GatewayConfig(
        name=name,
        host=table.take("host", _label, socket.gethostname()),
        control=table.take("control", _endpoint),
        nbd_socket=table.take("nbd_socket", _socket_path),
        nbd_listen=table.take("nbd_listen", _endpoint, None),
        run_dir=table.take("run_dir", _path),
        metrics=table.take("metrics", _endpoint, None),
        limits=_client_limits(table),
        read_only=table.take("read_only", _patterns, ()),
        tls=_tls(table.table("tls")) if table.has("tls") else None,
    )
    table.finish()
    return gateway


def _tls(table: "_Table") -> TlsConfig:
    tls = TlsConfig(
        certificate=table.take("certificate", _path),
        key=table.take("key", _path),
        client_ca=table.take("client_ca", _path, None),
        tcp=table.take("tcp", _tls_mode, "required"),
        socket=table.take("socket", _tls_mode, "off"),
        access=tuple(_access_rule(each) for each in table.tables("access")),
    )
    table.finish()
    return tls


def _access_rule(table: "_Table") -> AccessRule:
    rule = AccessRule(
        clients=table.take("clients", _patterns),
        images=table.take("images", _patterns),
        read_only=table.take("read_only", _flag, False),
    )
    table.finish()
    return rule


def _client_limits(table: "_Table") -> ClientLimits:
    usual = ClientLimits()
    return ClientLimits(
        clients_max=table.take("clients_max", _clients, usual.clients_max),
        client_bytes_in_flight=table.take(
            "client_bytes_in_flight", _bytes_in_flight, usual.client_bytes_in_flight
        ),
        bytes_in_flight=table.take("bytes_in_flight", _bytes_in_flight, usual.bytes_in_flight),
        handshake_timeout_s=table.take(
            "handshake_timeout", _handshake_timeout, usual.handshake_timeout_s
        ),
        idle_timeout_s=table.take("idle_timeout", _time, usual.idle_timeout_s),
    )


def _arbiter(name: str, table: "_Table") -> ArbiterConfig:
    arbiter = ArbiterConfig(
        name=name,
        data_dir=table.take("data_dir", _path),
        listen=table.take("listen", _endpoint),
        host=table.take("host", _label, socket.gethostname()),
        metrics=table.take("metrics", _endpoint, None),
    )
    table.finish()
    return arbiter


def _dev(table: "_Table") -> DevConfig:
    dev = DevConfig(
        etcd_peer=table.take("etcd_peer", _endpoint),
        etcd_data_dir=table.take("etcd_data_dir", _path),
        log_dir=table.take("log_dir", _path),
        run_dir=table.take("run_dir", _path),
        pool=table.take("pool", _pool),
    )
    table.finish()
    return dev


_REQUIRED: Any = object()


class _Table:
    """A table of the file, which remembers what was asked of it: all else in it is unknown."""

    def __init__(self, path: Path, name: str, values: dict[str, Any]) -> None:
        self._path = path
        self._name = name
        self._values = values
        self._known: set[str] = set()

    def take(self, key: str, convert: Callable[[Any], T], default: Any = _REQUIRED) -> T:
        """Return the converted value of `key`; `convert` raises ValueError or HciError if wrong."""
        self._known.add(key)
        if key not in self._values:
            if default is _REQUIRED:
                raise ConfigError(f"{self._full(key)} is missing", self._path)
            return default  # type: ignore[no-any-return]
        value = self._values[key]
        try:
            return convert(value)
        except (ValueError, HciError) as error:
            raise ConfigError(f"{self._full(key)} = {value!r}: {error}", self._path) from error

    def has(self, key: str) -> bool:
        self._known.add(key)
        return key in self._values

    def table(self, key: str) -> "_Table":
        return _Table(self._path, self._full(key), self.take(key, _mapping))

    def members(self, kind: str) -> dict[str, "_Table"]:
        """Return the tables `[kind.NAME]` by name."""
        values = self.take(kind, _mapping, {})
        for name in values:
            try:
                ids.node_name(name)
            except HciError as error:
                raise ConfigError(f"{kind}.{name}: {error}", self._path) from error
        inner = _Table(self._path, self._full(kind), values)
        return {name: inner.table(name) for name in values}

    def tables(self, key: str) -> list["_Table"]:
        """Return the tables `[[key]]`, of which there may be none."""
        values = self.take(key, _mappings, [])
        return [
            _Table(self._path, f"{self._full(key)}.{number}", value)
            for number, value in enumerate(values)
        ]

    def finish(self) -> None:
        """Refuse what nobody asked for."""
        unknown = sorted(set(self._values) - self._known)
        if unknown:
            known = ", ".join(sorted(self._known))
            raise ConfigError(f"unknown key {self._full(unknown[0])} (known: {known})", self._path)

    def _full(self, key: str) -> str:
        return f"{self._name}.{key}" if self._name else key


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("must be a table")
    return value


def _mappings(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise ValueError("must be a list of tables")
    return [_mapping(entry) for entry in value]


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _tls_mode(value: Any) -> str:
    if value not in ("required", "optional", "off"):
        raise ValueError("must be required, optional or off")
    return str(value)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError("must be a string that is not empty")
    return value


def _hex_32(value: Any) -> str:
    if not re.fullmatch(r"[0-9a-f]{32}", _text(value)):
        raise ValueError("must be 32 lower-case hex digits")
    return _text(value)


def _endpoint(value: Any) -> Endpoint:
    return Endpoint.parse(_text(value))


def _endpoints(value: Any) -> tuple[Endpoint, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError('must be a list such as ["127.0.0.1:2379"]')
    return tuple(_endpoint(entry) for entry in value)


def _path(value: Any) -> Path:
    path = Path(_text(value))
    if not path.is_absolute():
        raise ValueError("must be an absolute path")
    return path


def _socket_path(value: Any) -> Path:
    path = _path(value)
    length = len(os.fsencode(path))
    if length > LONGEST_SOCKET_PATH:
        raise ValueError(f"a socket's path has at most {LONGEST_SOCKET_PATH} bytes, not {length}")
    return path


def _label(value: Any) -> str:
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,252})", _text(value)):
        raise ValueError("must be letters, digits, dots, hyphens or underscores")
    return _text(value)


def _log_bytes(value: Any) -> int:
    size_bytes = value if type(value) is int else geometry.parse_size(_text(value))
    if size_bytes < SMALLEST_LOG_BYTES or size_bytes % 4096:
        raise ValueError("must be at least 16M, in whole blocks of 4096 bytes")
    return size_bytes


def _rate(value: Any) -> int:
    bytes_per_second = value if type(value) is int else geometry.parse_size(_text(value))
    if bytes_per_second != 0 and bytes_per_second < SLOWEST_HEAL:
        raise ValueError("must be at least 1M each second, or 0 for no limit")
    return bytes_per_second


def _patterns(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError('must be a list such as ["vms/golden-*"]')
    return tuple(_text(entry) for entry in value)


def _clients(value: Any) -> int:
    if type(value) is not int or not 1 <= value <= LARGEST_CLIENTS:
        raise ValueError(f"must be a number from 1 to {LARGEST_CLIENTS}")
    return value


def _bytes_in_flight(value: Any) -> int:
    size_bytes = value if type(value) is int else geometry.parse_size(_text(value))
    if size_bytes < SMALLEST_CLIENT_BYTES:
        raise ValueError("must be at least 1M")
    return size_bytes


def _time(value: Any) -> int:
    """Return seconds; 0: never."""
    if value == 0 and type(value) is int:
        return 0
    found = re.fullmatch(r"([1-9][0-9]{0,5})([smhd])", _text(value))
    if found is None:
        raise ValueError('must look like "30s", "10m" or "12h", or be 0 for never')
    return int(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86_400}[found[2]]


def _handshake_timeout(value: Any) -> int:
    seconds = _time(value)
    if not 1 <= seconds <= 3600:
        raise ValueError("must be from 1s to 1h")
    return seconds


def _every(value: Any) -> int:
    """Return seconds; 0: never."""
    if value == 0 and type(value) is int:
        return 0
    found = re.fullmatch(r"([1-9][0-9]{0,5})([mhdw])", _text(value))
    if found is None:
        raise ValueError('must look like "12h", "7d" or "2w", or be 0 for never')
    return int(found[1]) * {"m": 60, "h": 3600, "d": 86_400, "w": 604_800}[found[2]]


def _shards_at_once(value: Any) -> int:
    if type(value) is not int or not 1 <= value <= 64:
        raise ValueError("must be a number from 1 to 64")
    return value


def _percent(value: Any) -> int:
    if type(value) is not int or not 1 <= value <= 100:
        raise ValueError("must be a number from 1 to 100")
    return value


def _milliseconds(value: Any) -> int:
    if type(value) is not int or not 10 <= value <= 60_000:
        raise ValueError("must be a number of milliseconds from 10 to 60000")
    return value


def _milliseconds_or_never(value: Any) -> int:
    return 0 if value == 0 and type(value) is int else _milliseconds(value)


def _slow_seconds(value: Any) -> int:
    if type(value) is not int or not 3 <= value <= 3600:
        raise ValueError("must be a number of seconds from 3 to 3600")
    return value


def _pool(value: Any) -> str:
    return ids.pool_name(_text(value))
