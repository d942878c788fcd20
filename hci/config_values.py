"""How values are taken from the tables of a configuration, and what each kind of value may be.

A table remembers which keys it was asked for and refuses all others in it; a value that is wrong is
refused with the full name of its key and what was expected. A function here takes what TOML gave
and returns what the configuration keeps; it raises ValueError or HciError with the rest of a
sentence such as "must be an absolute path".
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from hci.config import Endpoint
from hci.errors import ConfigError
from shard import geometry, ids
from shard.errors import HciError

T = TypeVar("T")

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

_REQUIRED: Any = object()


class Table:
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

    def table(self, key: str) -> "Table":
        return Table(self._path, self._full(key), self.take(key, mapping))

    def members(self, kind: str) -> dict[str, "Table"]:
        """Return the tables `[kind.NAME]` by name."""
        values = self.take(kind, mapping, {})
        for name in values:
            try:
                ids.node_name(name)
            except HciError as error:
                raise ConfigError(f"{kind}.{name}: {error}", self._path) from error
        inner = Table(self._path, self._full(kind), values)
        return {name: inner.table(name) for name in values}

    def tables(self, key: str) -> list["Table"]:
        """Return the tables `[[key]]`, of which there may be none."""
        values = self.take(key, mappings, [])
        return [
            Table(self._path, f"{self._full(key)}.{number}", value)
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


def mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("must be a table")
    return value


def mappings(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise ValueError("must be a list of tables")
    return [mapping(entry) for entry in value]


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def tls_mode(value: Any) -> str:
    if value not in ("required", "optional", "off"):
        raise ValueError("must be required, optional or off")
    return str(value)


def text(value: Any) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError("must be a string that is not empty")
    return value


def hex_32(value: Any) -> str:
    if not re.fullmatch(r"[0-9a-f]{32}", text(value)):
        raise ValueError("must be 32 lower-case hex digits")
    return text(value)


def endpoint(value: Any) -> Endpoint:
    return Endpoint.parse(text(value))


def endpoints(value: Any) -> tuple[Endpoint, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError('must be a list such as ["127.0.0.1:2379"]')
    return tuple(endpoint(entry) for entry in value)


def path(value: Any) -> Path:
    found = Path(text(value))
    if not found.is_absolute():
        raise ValueError("must be an absolute path")
    return found


def socket_path(value: Any) -> Path:
    found = path(value)
    length = len(os.fsencode(found))
    if length > LONGEST_SOCKET_PATH:
        raise ValueError(f"a socket's path has at most {LONGEST_SOCKET_PATH} bytes, not {length}")
    return found


def label(value: Any) -> str:
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,252})", text(value)):
        raise ValueError("must be letters, digits, dots, hyphens or underscores")
    return text(value)


def log_bytes(value: Any) -> int:
    size_bytes = value if type(value) is int else geometry.parse_size(text(value))
    if size_bytes < SMALLEST_LOG_BYTES or size_bytes % 4096:
        raise ValueError("must be at least 16M, in whole blocks of 4096 bytes")
    return size_bytes


def rate(value: Any) -> int:
    bytes_per_second = value if type(value) is int else geometry.parse_size(text(value))
    if bytes_per_second != 0 and bytes_per_second < SLOWEST_HEAL:
        raise ValueError("must be at least 1M each second, or 0 for no limit")
    return bytes_per_second


def patterns(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError('must be a list such as ["vms/golden-*"]')
    return tuple(text(entry) for entry in value)


def clients(value: Any) -> int:
    if type(value) is not int or not 1 <= value <= LARGEST_CLIENTS:
        raise ValueError(f"must be a number from 1 to {LARGEST_CLIENTS}")
    return value


def bytes_in_flight(value: Any) -> int:
    size_bytes = value if type(value) is int else geometry.parse_size(text(value))
    if size_bytes < SMALLEST_CLIENT_BYTES:
        raise ValueError("must be at least 1M")
    return size_bytes


def time(value: Any) -> int:
    """Return seconds; 0: never."""
    if value == 0 and type(value) is int:
        return 0
    found = re.fullmatch(r"([1-9][0-9]{0,5})([smhd])", text(value))
    if found is None:
        raise ValueError('must look like "30s", "10m" or "12h", or be 0 for never')
    return int(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86_400}[found[2]]


def handshake_timeout(value: Any) -> int:
    seconds = time(value)
    if not 1 <= seconds <= 3600:
        raise ValueError("must be from 1s to 1h")
    return seconds


def every(value: Any) -> int:
    """Return seconds; 0: never."""
    if value == 0 and type(value) is int:
        return 0
    found = re.fullmatch(r"([1-9][0-9]{0,5})([mhdw])", text(value))
    if found is None:
        raise ValueError('must look like "12h", "7d" or "2w", or be 0 for never')
    return int(found[1]) * {"m": 60, "h": 3600, "d": 86_400, "w": 604_800}[found[2]]


def shards_at_once(value: Any) -> int:
    if type(value) is not int or not 1 <= value <= 64:
        raise ValueError("must be a number from 1 to 64")
    return value


def percent(value: Any) -> int:
    if type(value) is not int or not 1 <= value <= 100:
        raise ValueError("must be a number from 1 to 100")
    return value


def milliseconds(value: Any) -> int:
    if type(value) is not int or not 10 <= value <= 60_000:
        raise ValueError("must be a number of milliseconds from 10 to 60000")
    return value


def milliseconds_or_never(value: Any) -> int:
    return 0 if value == 0 and type(value) is int else milliseconds(value)


def slow_seconds(value: Any) -> int:
    if type(value) is not int or not 3 <= value <= 3600:
        raise ValueError("must be a number of seconds from 3 to 3600")
    return value


def poll_us(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= 1000:
        raise ValueError("must be a number of microseconds from 0 (never) to 1000")
    return value


def pool(value: Any) -> str:
    return ids.pool_name(text(value))
