"""A cluster of several hosts on this machine, each member with a network of its own.

Three members of etcd, the nodes, the gateways and an arbiter run as they do on real hosts, with a
configuration and addresses made for them; sockets in the file system connect what shares a host.
`network` makes lines fail. All else is as in `DevCluster`, whose assertions work here too.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.devcluster import POOL, DevCluster
from tests.hosts.network import PROJECT, Network
from tests.hosts.switch import OUTSIDE

ETCD_MEMBERS = 3
START_TIMEOUT_S = 60.0
BACKLOG = 128

CLIENT, PEER, DATA, CONTROL, METRICS, NBD = 2379, 2380, 7100, 7101, 7102, 10809

READY = {
    "etcd": b"ready to serve client requests",
    "node": b"event=node_registered",
    "gateway": b"event=gateway_started",
    "arbiter": b"event=arbiter_registered",
}
"""What a member logs when it can do its work."""


class StartError(Exception):
    """A member ended instead of starting, or took too long; the message ends with its log."""


@dataclass
class _Member:
    name: str
    kind: str
    host: str
    process: subprocess.Popen[bytes] | None = None


class HostCluster(DevCluster):
    """`nodes` hosts with a node each, `gateways` of them with a gateway, etcd on three.

    With `arbiter`, it is on the host after the nodes', as is the last member of etcd then.
    `settings` are further ones of members, by name.
    """

    def __init__(
        self,
        *,
        nodes: int = 3,
        gateways: int = 2,
        arbiter: bool = False,
        seed: int = 0,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__(nodes=nodes, gateways=gateways, arbiter=arbiter)
        self.etcds = [f"etcd{number + 1}" for number in range(ETCD_MEMBERS)]
        self._seed = seed
        self._settings = settings or {}
        self._members = {member.name: member for member in self._planned()}
        self._listeners: dict[str, socket.socket] = {}
        self._network: Network | None = None

    # Hosts and their network.

    @property
    def network(self) -> Network:
        """The lines between the members; there once the cluster was started."""
        assert self._network is not None, "the cluster has not been started"
        return self._network

    def host(self, name: str) -> list[str]:
        """All members of a host, such as `host1`."""
        return [member.name for member in self._members.values() if member.host == name]

    def beside(self, name: str) -> list[str]:
        """All members of the host on which a member is, itself included."""
        return self.host(self._members[name].host)

    def isolate(self, some: Iterable[str]) -> None:
        """Cuts members off from all others, and from whoever asks from outside."""
        some = set(some)
        self.network.part(some, [name for name in [*self._members, OUTSIDE] if name not in some])

    # What `hci dev` does for a DevCluster.

    def start(self) -> None:
        """Starts all that does not run; the first time, the pool is created too."""
        is_new = self._network is None
        if is_new:
            self._network = Network(self.directory, self._members, self._seed)
            self.config.write_text(self._configuration())
        self.run("all")
        if is_new:
            policy = ["--policy", "thin-arbiter", "--arbiter", "arbiter"] if self.arbiter else []
            self.hci("pool", "create", POOL, *policy)
        self.await_health("ok")

    def around(self) -> list[str]:
        """Commands come from outside all hosts."""
        return self.network.inside()

    def kill(self, member: str) -> None:
        """SIGKILLs a member, or `all`; nothing starts it again by itself."""
        self.kill_together(list(self._members) if member == "all" else [member])

    def kill_together(self, names: Iterable[str]) -> None:
        """SIGKILLs several members at once, those that run; returns when they have ended."""
        running = [self._members[name].process for name in names]
        for process in running:
            if process is not None:
                _kill(process)
        for process in running:
            if process is not None:
                process.wait()

    def run(self, member: str) -> None:
        """Starts a killed member, or `all` that are, again; returns when they work."""
        names = list(self._members) if member == "all" else [member]
        for kind in READY:
            self.run_together(
                [
                    name
                    for name in names
                    if self._members[name].kind == kind and _state(self._members[name]) != "running"
                ]
            )

    def run_together(self, names: Sequence[str], within: Sequence[str] = ()) -> None:
        """Starts several members, that do not run, at once.

        `within` is put before their commands, such as a program that changes what they see.
        """
        began = {name: self._log_size(name) for name in names}
        for name in names:
            self._spawn(self._members[name], within)
        for name in names:
            self._await_ready(self._members[name], began[name])

    def members(self) -> dict[str, dict[str, Any]]:
        """Name to `{name, kind, pid, state, data_dir, log}`."""
        return {
            name: {
                "name": name,
                "kind": member.kind,
                "pid": member.process.pid if member.process is not None else None,
                "state": _state(member),
                "data_dir": str(self.directory / name),
                "log": str(self._log(name)),
            }
            for name, member in self._members.items()
        }

    def mend(self) -> None:
        """Mends all lines, continues what was stopped, and then does as a DevCluster does."""
        self.network.mend()
        for member in self._members.values():
            if member.process is not None and member.process.poll() is None:
                member.process.send_signal(signal.SIGCONT)
        super().mend()

    def close(self) -> None:
        """Kills everything and deletes what it kept."""
        for member in self._members.values():
            if member.process is not None:
                _kill(member.process)
        for member in self._members.values():
            if member.process is not None:
                member.process.wait()
        for listener in self._listeners.values():
            listener.close()
        self._listeners.clear()
        if self._network is not None:
            self._network.close()
        self.config.unlink(missing_ok=True)  # there is nothing that `hci dev stop` could stop
        super().close()

    # Inside.

    def _planned(self) -> Iterable[_Member]:
        hosts = [f"host{number + 1}" for number in range(ETCD_MEMBERS)]
        for name, host in zip(self.etcds, hosts, strict=True):
            yield _Member(name, "etcd", host)
        for number, name in enumerate(self.nodes, start=1):
            yield _Member(name, "node", f"host{number}")
        for number, name in enumerate(self.gateways, start=1):
            yield _Member(name, "gateway", f"host{number}")
        if self.arbiter:
            yield _Member("arbiter", "arbiter", f"host{len(self.nodes) + 1}")

    def _at(self, name: str, port: int) -> str:
        return f"{self.network.addresses[name]}:{port}"

    def _configuration(self) -> str:
        etcd = [self._at(name, CLIENT) for name in self.etcds]
        sections: dict[str, dict[str, Any]] = {
            "cluster": {"id": secrets.token_hex(16), "etcd": etcd}
        }
        for name, member in self._members.items():
            own: dict[str, Any] = {"host": member.host}
            if member.kind in ("node", "arbiter"):
                own |= {
                    "data_dir": str(self.directory / name),
                    "listen": self._at(name, DATA),
                }
            if member.kind == "node":
                own["socket"] = str(self.directory / f"{name}.sock")
            if member.kind == "gateway":
                own |= {
                    "run_dir": str(self.directory / name),
                    "nbd_socket": str(self.directory / name / "nbd.sock"),
                    "nbd_listen": self._at(name, NBD),
                }
            if member.kind in ("node", "gateway"):
                own["control"] = self._at(name, CONTROL)
                own["metrics"] = self._at(name, METRICS)
            own |= self._settings.get(name, {})
            if member.kind != "etcd":
                sections[f"{member.kind}.{name}"] = own
        return "\n".join(
            f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in own.items())
            for name, own in sections.items()
        )

    def _spawn(self, member: _Member, within: Sequence[str]) -> None:
        name = member.name
        command, files = [*self.network.inside(name), *within], []
        if member.kind == "etcd":
            command += self._etcd(name)
        else:
            if member.kind == "gateway":
                listener = self._listener(name)
                files = [listener.fileno()]
                activate = "hci.dev.activate"
                command += [sys.executable, "-m", activate, str(listener.fileno()), "nbd"]
            command += [sys.executable, "-m", "hci", member.kind, "serve"]
            command += ["--config", str(self.config), "--name", name]
        skip = ("ETCD_", "LISTEN_", "HCI_")
        environ = {key: value for key, value in os.environ.items() if not key.startswith(skip)}
        self._log(name).parent.mkdir(exist_ok=True)
        with self._log(name).open("ab") as log:
            member.process = subprocess.Popen(
                command,
                env=environ | {"PYTHONPATH": str(PROJECT)},
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=files,
            )

    def _etcd(self, name: str) -> list[str]:
        client, peer = f"http://{self._at(name, CLIENT)}", f"http://{self._at(name, PEER)}"
        members = ",".join(f"{other}=http://{self._at(other, PEER)}" for other in self.etcds)
        return [
            *("etcd", f"--name={name}", f"--data-dir={self.directory / name}"),
            *(f"--listen-client-urls={client}", f"--advertise-client-urls={client}"),
            *(f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}"),
            f"--initial-cluster={members}",
            # Else a member that comes back unseats the leader, which takes seconds.
            "--pre-vote",
        ]

    def _listener(self, gateway: str) -> socket.socket:
        """The socket of a gateway's clients, held here while it restarts, as systemd does."""
        if gateway not in self._listeners:
            path = Path(self.gateway_socket(gateway))
            path.parent.mkdir(exist_ok=True)
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listener.bind(str(path))
            listener.listen(BACKLOG)
            self._listeners[gateway] = listener
        return self._listeners[gateway]

    def _log(self, name: str) -> Path:
        return self.directory / "log" / f"{name}.log"

    def _log_size(self, name: str) -> int:
        with contextlib.suppress(FileNotFoundError):
            return self._log(name).stat().st_size
        return 0

    def _await_ready(self, member: _Member, since: int) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        assert member.process is not None
        while True:
            ended = member.process.poll() is not None
            with self._log(member.name).open("rb") as log:
                log.seek(since)
                said = log.read()
            if READY[member.kind] in said:
                return
            if ended or time.monotonic() > deadline:
                how = "ended" if ended else f"is not ready after {START_TIMEOUT_S:.0f} s"
                raise StartError(f"{member.name} {how}: {said[-2000:].decode(errors='replace')}")
            time.sleep(0.02)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """With its children: a member may have been started by a program that waits for it."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def _state(member: _Member) -> str:
    if member.process is None:
        return "stopped"
    return "running" if member.process.poll() is None else "dead"
