"""Which TCP ports a new cluster gets: none that another dev cluster of this user has.

That nobody listens on a port now says too little. Two clusters may be made at the same time, and
the ports of a member that was killed, or of a cluster that is stopped, are free only until it
starts again. So a list names the configuration of every dev cluster of this user, and who chooses
ports keeps the list locked until its own configuration is in it and on disk.

The list goes with the machine's boot, as sockets do; a cluster is in it again from its next start.
"""

import fcntl
import json
import os
import random
import re
import socket
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from hci.config import Endpoint
from hci.errors import DevError

LOOPBACK = "127.0.0.1"

_PORTS = range(20000, 32000)
"""Below the range from which Linux takes ports for outgoing connections (32768 on), so that a
stopped cluster finds its ports free when it starts again."""

_PORT = re.compile(r':([0-9]{1,5})"')
"""In a configuration, of which a person may have made anything."""


@contextmanager
def listed(run_dir: Path, config: Path) -> Iterator[frozenset[int]]:
    """Put a configuration into the list in `run_dir`; give the ports that the others there have.

    The block writes the configuration, unless it is there. Nobody else chooses ports meanwhile.
    """
    with open(run_dir / "clusters.json", "a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        others = [path for path in _paths(file.read()) if path != config and path.is_file()]
        yield frozenset(port for path in others for port in _ports_of(path))
        if config.is_file():
            others.append(config)
        file.truncate(0)
        file.write(json.dumps([os.fspath(path) for path in others]))


def choose(count: int, taken: Collection[int]) -> list[int]:
    """Return loopback ports that nobody listens on now, each once and none of them `taken`."""
    chosen: list[int] = []
    with ExitStack() as held:
        for port in random.sample(_PORTS, len(_PORTS)):
            if port in taken:
                continue
            probe = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
            chosen.append(port)
            if len(chosen) == count:
                return chosen
    raise DevError(f"no {count} free TCP ports between {_PORTS.start} and {_PORTS.stop}")


def is_free(endpoint: Endpoint) -> bool:
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


def _paths(text: str) -> list[Path]:
    try:
        found = json.loads(text)
    except ValueError:
        return []
    return [Path(path) for path in found if isinstance(path, str)]


def _ports_of(config: Path) -> list[int]:
    try:
        return [int(port) for port in _PORT.findall(config.read_text(encoding="utf-8"))]
    except (OSError, UnicodeError):
        return []
