"""Where a dev cluster keeps what: its folder, its sockets, its ports, and the file that says so.

All is decided once, when the cluster is made, and written to `hci.toml`: later starts read that
file and choose nothing.
"""

import json
import os
import random
import secrets
import socket
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from hci.config import Endpoint
from hci.errors import DevError

CONFIG_NAME = "hci.toml"
LOOPBACK = "127.0.0.1"

MEMBERS_MAX = 64
"""Nodes, or gateways, of one cluster on one machine."""

_PORTS = range(20000, 32000)
"""Below the range from which Linux takes ports for outgoing connections (32768 on), so that a
stopped cluster finds its ports free when it starts again."""


def new_config(folder: Path, nodes: int, gateways: int, pool: str) -> str:
    """Return the text of the configuration of a new cluster in `folder`. Writes nothing."""
    return render(_sections(folder, nodes, gateways, pool))


def render(sections: Mapping[str, Mapping[str, Any]]) -> str:
    """Return TOML. Values are strings and lists of them, which JSON writes the same way."""
    lines = ["# Written by `hci dev start`. Members read it when they start."]
    for name, values in sections.items():
        lines += ["", f"[{name}]"]
        lines += [
            f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()
        ]
    return "\n".join(lines) + "\n"


def write(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    new = path.with_name(f".{path.name}.new")
    with open(new, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def make_run_dir(path: Path) -> None:
    """Make the folder for sockets, unless it is there. Nobody else may have made it."""
    path.mkdir(mode=0o700, exist_ok=True)
    status = path.lstat()
    if not path.is_dir() or path.is_symlink() or status.st_uid != os.geteuid():
        raise DevError(f"{path} belongs to somebody else; remove it, then start again")


def _sections(folder: Path, nodes: int, gateways: int, pool: str) -> dict[str, dict[str, Any]]:
    cluster_id = secrets.token_hex(16)
    run_dir = _run_dir_base() / f"hci-dev-{cluster_id[:10]}"
    ports = iter(free_ports(2 + 3 * nodes + 3 * gateways))

    def endpoint() -> str:
        return str(Endpoint(LOOPBACK, next(ports)))

    sections: dict[str, dict[str, Any]] = {
        "cluster": {"id": cluster_id, "etcd": [endpoint()]},
        "dev": {
            "etcd_peer": endpoint(),
            "etcd_data_dir": str(folder / "etcd"),
            "log_dir": str(folder / "log"),
            "run_dir": str(run_dir),
            "pool": pool,
        },
    }
    for number in range(1, nodes + 1):
        sections[f"node.node{number}"] = {
            "data_dir": str(folder / f"node{number}"),
            "listen": endpoint(),
            "control": endpoint(),
            "socket": str(run_dir / f"node{number}.sock"),
            "host": f"host{number}",
            "metrics": endpoint(),
        }
    for number in range(1, gateways + 1):
        sections[f"gateway.gateway{number}"] = {
            "host": f"host{number}",
            "control": endpoint(),
            "nbd_socket": str(run_dir / f"gateway{number}" / "nbd.sock"),
            "nbd_listen": endpoint(),
            "run_dir": str(run_dir / f"gateway{number}"),
            "metrics": endpoint(),
        }
    return sections


def _run_dir_base() -> Path:
    """A short folder of this user: sockets have at most 107 bytes of path."""
    candidates = [Path("/run")] if os.geteuid() == 0 else []
    session = os.environ.get("XDG_RUNTIME_DIR", "")
    if session.startswith("/") and len(os.fsencode(session)) <= 40:
        candidates.append(Path(session))
    for base in candidates:
        if base.is_dir() and os.access(base, os.W_OK):
            return base
    temporary = Path(tempfile.gettempdir())
    return temporary if len(os.fsencode(temporary)) <= 40 else Path("/tmp")  # noqa: S108


def free_ports(count: int) -> list[int]:
    """Return ports of the loopback address that nobody listens on now, each once."""
    chosen: list[int] = []
    with ExitStack() as held:
        for port in random.sample(_PORTS, len(_PORTS)):
            probe = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
            chosen.append(port)
            if len(chosen) == count:
                return chosen
    raise DevError(f"no {count} free TCP ports between {_PORTS.start} and {_PORTS.stop}")


def port_is_free(endpoint: Endpoint) -> bool:
    """Whether a daemon could listen there now."""
    family = socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((endpoint.host, endpoint.port))
            probe.listen(1)
        except OSError:
            return False
    return True
