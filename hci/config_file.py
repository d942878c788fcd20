"""The configuration file: which one is meant, and how it becomes the sections of `hci.config`.

A host's file holds its own members only; that of a cluster on one machine (`hci dev`) holds all of
them. A key that is not known is refused, with its full name and the names known in its place, so
that a slip of the pen is never a silent default. Nothing here opens what the file names.
"""

import os
import socket
import tomllib
from collections.abc import Mapping
from pathlib import Path

from hci import config_values as values
from hci.config import (
    DEFAULT_LOG_BYTES,
    DEFAULT_POLL_US,
    DEFAULT_ZONE,
    AccessRule,
    ArbiterConfig,
    ClientLimits,
    ClusterConfig,
    Config,
    DevConfig,
    GatewayConfig,
    NodeConfig,
    TlsConfig,
)
from hci.config_values import Table
from hci.errors import ConfigError
from shard.scrub import ScrubLimits
from vmstore.healing import HealLimits
from vmstore.slowness import SlowLimits

SYSTEM_CONFIG = Path("/etc/hci/hci.toml")


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
        read = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        # Also numbers of thousands of digits, and arrays in arrays without end.
        raise ConfigError(f"is not valid TOML: {error}", path) from error
    top = Table(path, "", read)
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


def _cluster(table: Table) -> ClusterConfig:
    cluster = ClusterConfig(
        id=table.take("id", values.hex_32),
        etcd=table.take("etcd", values.endpoints),
    )
    table.finish()
    return cluster


def _heal(table: Table) -> HealLimits:
    usual = HealLimits()
    limits = HealLimits(
        bytes_per_second=table.take("bytes_per_second", values.rate, usual.bytes_per_second),
        shards_at_once=table.take("shards_at_once", values.shards_at_once, usual.shards_at_once),
        share_percent=table.take("share_percent", values.percent, usual.share_percent),
    )
    table.finish()
    return limits


def _slow(table: Table, path: Path) -> SlowLimits:
    usual = SlowLimits()
    limits = SlowLimits(
        report_ms=table.take("report_ms", values.milliseconds, usual.report_ms),
        leave_behind_ms=table.take(
            "leave_behind_ms", values.milliseconds_or_never, usual.leave_behind_ms
        ),
        for_s=float(table.take("for_s", values.slow_seconds, int(usual.for_s))),
        back_after_s=float(
            table.take("back_after_s", values.slow_seconds, int(usual.back_after_s))
        ),
    )
    table.finish()
    if 0 < limits.leave_behind_ms < limits.report_ms:
        told = f"slow.leave_behind_ms = {limits.leave_behind_ms}: must be 0, or at least report_ms"
        raise ConfigError(told, path)
    return limits


def _scrub(table: Table) -> ScrubLimits:
    usual = ScrubLimits()
    limits = ScrubLimits(
        every_s=table.take("every", values.every, usual.every_s),
        bytes_per_second=table.take("bytes_per_second", values.rate, usual.bytes_per_second),
        share_percent=table.take("share_percent", values.percent, usual.share_percent),
    )
    table.finish()
    return limits


def _node(name: str, table: Table) -> NodeConfig:
    node = NodeConfig(
        name=name,
        data_dir=table.take("data_dir", values.path),
        listen=table.take("listen", values.endpoint),
        control=table.take("control", values.endpoint),
        socket=table.take("socket", values.socket_path, None),
        host=table.take("host", values.label, socket.gethostname()),
        zone=table.take("zone", values.label, DEFAULT_ZONE),
        log_bytes=table.take("log_bytes", values.log_bytes, DEFAULT_LOG_BYTES),
        metrics=table.take("metrics", values.endpoint, None),
        poll_us=table.take("poll_us", values.poll_us, DEFAULT_POLL_US),
    )
    table.finish()
    return node


def _gateway(name: str, table: Table) -> GatewayConfig:
    gateway = GatewayConfig(
        name=name,
        host=table.take("host", values.label, socket.gethostname()),
        control=table.take("control", values.endpoint),
        nbd_socket=table.take("nbd_socket", values.socket_path),
        nbd_listen=table.take("nbd_listen", values.endpoint, None),
        run_dir=table.take("run_dir", values.path),
        metrics=table.take("metrics", values.endpoint, None),
        limits=_client_limits(table),
        read_only=table.take("read_only", values.patterns, ()),
        tls=_tls(table.table("tls")) if table.has("tls") else None,
        poll_us=table.take("poll_us", values.poll_us, DEFAULT_POLL_US),
    )
    table.finish()
    return gateway


def _tls(table: Table) -> TlsConfig:
    tls = TlsConfig(
        certificate=table.take("certificate", values.path),
        key=table.take("key", values.path),
        client_ca=table.take("client_ca", values.path, None),
        tcp=table.take("tcp", values.tls_mode, "required"),
        socket=table.take("socket", values.tls_mode, "off"),
        access=tuple(_access_rule(each) for each in table.tables("access")),
    )
    table.finish()
    return tls


def _access_rule(table: Table) -> AccessRule:
    rule = AccessRule(
        clients=table.take("clients", values.patterns),
        images=table.take("images", values.patterns),
        read_only=table.take("read_only", values.flag, False),
    )
    table.finish()
    return rule


def _client_limits(table: Table) -> ClientLimits:
    usual = ClientLimits()
    return ClientLimits(
        clients_max=table.take("clients_max", values.clients, usual.clients_max),
        client_bytes_in_flight=table.take(
            "client_bytes_in_flight", values.bytes_in_flight, usual.client_bytes_in_flight
        ),
        bytes_in_flight=table.take(
            "bytes_in_flight", values.bytes_in_flight, usual.bytes_in_flight
        ),
        handshake_timeout_s=table.take(
            "handshake_timeout", values.handshake_timeout, usual.handshake_timeout_s
        ),
        idle_timeout_s=table.take("idle_timeout", values.time, usual.idle_timeout_s),
    )


def _arbiter(name: str, table: Table) -> ArbiterConfig:
    arbiter = ArbiterConfig(
        name=name,
        data_dir=table.take("data_dir", values.path),
        listen=table.take("listen", values.endpoint),
        host=table.take("host", values.label, socket.gethostname()),
        metrics=table.take("metrics", values.endpoint, None),
    )
    table.finish()
    return arbiter


def _dev(table: Table) -> DevConfig:
    dev = DevConfig(
        etcd_peer=table.take("etcd_peer", values.endpoint),
        etcd_data_dir=table.take("etcd_data_dir", values.path),
        log_dir=table.take("log_dir", values.path),
        run_dir=table.take("run_dir", values.path),
        pool=table.take("pool", values.pool),
    )
    table.finish()
    return dev
