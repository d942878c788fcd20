"""Holds the gateways' listening NBD sockets while gateways come and go.

On a real host systemd does this. A client that connects while its gateway is down waits in the
socket's queue and is served by the next one, so a restart costs a guest no more than the restart.
A socket is bound when its gateway asks for it first; the gateway gets the same one from then on.

The holder ends by a signal, or by itself when the cluster's configuration is gone. It has nothing
to clean up: its sockets are in the cluster's run folder, which goes with the cluster.
"""

import argparse
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from hci import config_file
from hci.config import Config
from hci.errors import DevError

BACKLOG = 128
"""Clients that may wait while a gateway is down: more disks than a host's guests reconnect."""

CHECK_S = 2.0
"""How often it looks whether the cluster is still there."""

_ANSWER_S = 5.0
"""How long it waits for a client to say what it wants."""

_PATIENCE_S = 30.0
"""How long a client waits for it, on a machine that is busy."""

_OK = b"ok"


def address(config: Config) -> Path:
    """Where the holder of this cluster answers."""
    assert config.dev is not None, "only a dev cluster has a holder"
    return config.dev.run_dir / "holder.sock"


def take(config: Config, gateway: str) -> socket.socket:
    """Return the listening socket of a gateway. Raises DevError where there is none to have."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_PATIENCE_S)
        try:
            connection.connect(str(address(config)))
            connection.sendall(gateway.encode() + b"\n")
            answer, descriptors, _, _ = socket.recv_fds(connection, 1024, 1)
        except OSError as error:
            raise DevError(f"the holder of the NBD sockets does not answer: {error}") from error
    if answer != _OK or not descriptors:
        raise DevError(f"no NBD socket for {gateway}: {answer.decode(errors='replace')}")
    return socket.socket(fileno=descriptors[0])


class Holder:
    """The sockets, and the loop that hands them out."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._paths: Mapping[str, Path] = {
            name: gateway.nbd_socket for name, gateway in config.gateways.items()
        }
        self._held: dict[str, socket.socket] = {}

    def serve(self) -> None:
        """Answer until the cluster's configuration is gone."""
        with _listen(address(self._config)) as listener:
            listener.settimeout(CHECK_S)
            while self._config.path.exists():
                with suppress(TimeoutError, ConnectionError):
                    connection, _ = listener.accept()
                    with connection:
                        connection.settimeout(_ANSWER_S)
                        self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        name = connection.recv(256).decode("utf-8", "replace").strip()
        if name not in self._paths:
            connection.sendall(f"{name} is not in {self._config.path}".encode())
            return
        try:
            held = self._held.get(name) or _listen(self._paths[name])
        except OSError as error:
            connection.sendall(f"{self._paths[name]}: {error}".encode())
            return
        self._held[name] = held
        socket.send_fds(connection, [_OK], [held.fileno()])


def _listen(path: Path) -> socket.socket:
    """Listen at a path that nobody else uses: the lock of the cluster's folder sees to that.

    The socket is there once it listens: who finds one that does not is refused.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # No longer than the name of any socket here, whose path may be as long as one can be.
    new = path.with_name(".new")
    new.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(new))
        new.chmod(0o600)
        listener.listen(BACKLOG)
        new.replace(path)
    except OSError:
        listener.close()
        raise
    return listener


def main() -> None:
    """Command line of the process that `hci dev` starts."""
    parser = argparse.ArgumentParser(description="Holds the NBD sockets of a dev cluster.")
    parser.add_argument("--config", type=Path, required=True)
    Holder(config_file.load(parser.parse_args().config)).serve()


if __name__ == "__main__":
    main()
