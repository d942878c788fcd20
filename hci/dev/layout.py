"""Where a dev cluster keeps what: its folder, its sockets, its ports, and the file that says so.

All is decided once, when the cluster is made, and written to `hci.toml`: later starts read that
file and choose nothing.
"""

import json
import os
import secrets
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from hci.config import Endpoint
from hci.dev.ports import LOOPBACK, choose
from hci.errors import DevError

CONFIG_NAME = "hci.toml"

MEMBERS_MAX = 64
"""Nodes, or gateways, of one cluster on one machine."""


ARBITER = "arbiter"
"""Name of the thin arbiter, where a cluster has one."""


def new_config(
    folder: Path,
    nodes: int,
    gateways: int,
    pool: str,
    taken: Collection[int] = (),
    *,
    arbiter: bool = False,
) -> str:
    """Return the text of the configuration of a new cluster in `folder`. Writes nothing.

    `taken` are ports that it must not have; see `hci.dev.ports`.
    """
    ports = choose(2 + 3 * nodes + 3 * gateways + 2 * arbiter, taken)
    return render(_sections(folder, nodes, gateways, pool, ports, arbiter))


def clusters_dir() -> Path:
    """Return the folder where this user's dev clusters are listed, made where it is not there."""
    path = _run_dir_base() / f"hci-dev-of-{os.geteuid()}"
    make_run_dir(path)
    return path


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


def _sections(
    folder: Path, nodes: int, gateways: int, pool: str, chosen: Sequence[int], arbiter: bool
) -> dict[str, dict[str, Any]]:
    cluster_id = secrets.token_hex(16)
    run_dir = _run_dir_base() / f"hci-dev-{cluster_id[:10]}"
    ports = iter(chosen)

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
    if arbiter:
        sections[f"arbiter.{ARBITER}"] = {
            "data_dir": str(folder / ARBITER),
            "listen": endpoint(),
            "metrics": endpoint(),
            "host": f"host{max(nodes, gateways) + 1}",
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
