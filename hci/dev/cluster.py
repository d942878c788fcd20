"""Starting, stopping, killing and looking at the members of a dev cluster.

A member is `running`, `dead` (it was started and has ended without being asked to) or `stopped`.
One command at a time changes anything: each holds the lock of the cluster's folder meanwhile.
"""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hci import config_file
from hci.config import Config, DevConfig, Endpoint
from hci.dev import health, holder, layout, ports, process
from hci.dev.process import Process
from hci.errors import ConfigError, DevError
from shard.ids import pool_name
from vmstore.interrupts import undisturbed

STOP_GRACE_S = 30.0
"""A gateway flushes its images and a node makes a checkpoint before they end. More than a gateway
waits for its images (`vmstore.serving.STOP_S`), by what it does before and after that."""

HOLDER = "holder"


@dataclass(frozen=True)
class Member:
    """A process of the cluster, as the configuration names it."""

    name: str
    kind: str
    data_dir: Path
    log: Path
    ports: tuple[Endpoint, ...]


@dataclass(frozen=True)
class MemberState:
    """A member and how it is. `pid` is None unless it is running."""

    member: Member
    state: str
    pid: int | None


class DevCluster:
    """The cluster of one configuration file that has a section [dev]."""

    def __init__(self, config: Config) -> None:
        if config.dev is None:
            raise ConfigError(
                "is not of a cluster that `hci dev` started (it has no [dev]); "
                "give --config DIR/hci.toml",
                config.path,
            )
        self.config = config
        self.dev: DevConfig = config.dev
        self.folder = config.path.parent
        self.members: Sequence[Member] = tuple(self._members())

    # -- looking ------------------------------------------------------------------------------

    def states(self) -> list[MemberState]:
        """How every member is now, in the order in which they start."""
        return [self._state(member) for member in self.members]

    def running(self) -> list[Member]:
        """The members that run now."""
        return [each.member for each in self.states() if each.state == "running"]

    def member(self, name: str) -> Member:
        """Return the member of that name. Raises DevError where there is none."""
        for member in self.members:
            if member.name == name:
                return member
        known = ", ".join(member.name for member in self.members)
        raise DevError(f"no member {name!r} in {self.config.path}; it has {known}, or say `all`")

    # -- changing -----------------------------------------------------------------------------

    def start(self) -> None:
        """Start all members, return when they are healthy; on failure leave nothing running."""
        with self._locked():
            if running := self.running():
                rest = len(self.members) - len(running)
                advice = "; `hci dev run all` starts the rest" if rest else ""
                raise DevError(
                    f"the cluster in {self.folder} is already running "
                    f"({len(running)} of {len(self.members)} members){advice}"
                )
            try:
                self._run(self.members)
                health.ensure_pool(self.config)
            except BaseException:
                with undisturbed():
                    self._stop()
                raise

    def run(self, name: str) -> list[Member]:
        """Start one member, or with `all` those that do not run; return the ones started."""
        with self._locked():
            running = {member.name for member in self.running()}
            if name != "all" and self.member(name).name in running:
                raise DevError(f"{name} is already running")
            wanted = self.members if name == "all" else [self.member(name)]
            wanted = [member for member in wanted if member.name not in running]
            if "etcd" not in running and all(member.kind != "etcd" for member in wanted):
                raise DevError(f"{name} needs etcd, which is not running: `hci dev run etcd` first")
            self._run(wanted)
            return list(wanted)

    def kill(self, name: str) -> list[Member]:
        """SIGKILL one running member, or with `all` every one at once; return the ones killed."""
        with self._locked():
            running = self.running()
            if name == "all":
                wanted = running
            elif self.member(name) in running:
                wanted = [self.member(name)]
            else:
                raise DevError(f"{name} is not running; see `hci dev status`")
            process.kill(self._processes(wanted))
            return wanted

    def stop(self) -> list[str]:
        """Stop all members in good order; return the names of those that had to be killed."""
        with self._locked():
            return self._stop()

    # -- inside -------------------------------------------------------------------------------

    def _members(self) -> Iterator[Member]:
        def member(name: str, kind: str, data_dir: Path, *ports: Endpoint | None) -> Member:
            log = self.dev.log_dir / f"{name}.log"
            return Member(name, kind, data_dir, log, tuple(port for port in ports if port))

        peer = self.dev.etcd_peer
        yield member("etcd", "etcd", self.dev.etcd_data_dir, *self.config.cluster.etcd, peer)
        for node in self.config.nodes.values():
            yield member(node.name, "node", node.data_dir, node.listen, node.control)
        for gateway in self.config.gateways.values():
            ports = (gateway.control, gateway.nbd_listen)
            yield member(gateway.name, "gateway", gateway.run_dir, *ports)
        for arbiter in self.config.arbiters.values():
            yield member(arbiter.name, "arbiter", arbiter.data_dir, arbiter.listen)

    def _state(self, member: Member) -> MemberState:
        recorded = process.read(self._record(member.name))
        if recorded is None:
            return MemberState(member, "stopped", None)
        if recorded.is_alive:
            return MemberState(member, "running", recorded.pid)
        return MemberState(member, "dead", None)

    def _record(self, name: str) -> Path:
        return self.folder / "pid" / f"{name}.json"

    def _processes(self, members: Sequence[Member]) -> list[Process]:
        found = [process.read(self._record(member.name)) for member in members]
        return [each for each in found if each is not None]

    def _run(self, members: Sequence[Member]) -> None:
        """Start members in the order of their kinds, each kind healthy before the next."""
        for member in members:
            self._require_ports(member)
        layout.make_run_dir(self.dev.run_dir)
        holder_started = None
        if any(member.kind == "gateway" for member in members):
            holder_started = self._start_holder()
        for kind in reversed(KINDS):
            of_kind = [member for member in members if member.kind == kind]
            if kind == "gateway" and holder_started is not None:
                log = self.dev.log_dir / f"{HOLDER}.log"
                health.wait_for_socket(holder.address(self.config), holder_started, log)
            started = {member.name: self._spawn(member) for member in of_kind}
            health.wait(self.config, of_kind, started)
            if kind == "etcd":
                health.ensure_cluster(self.config)

    def _require_ports(self, member: Member) -> None:
        for port in member.ports:
            if not ports.is_free(port):
                raise DevError(
                    f"{member.name} needs {port}, which another program uses: "
                    f"stop that, or change the port in {self.config.path}"
                )

    def _spawn(self, member: Member) -> "subprocess.Popen[bytes]":
        record = self._record(member.name)
        environ = self._environ()
        if member.kind != "gateway":
            command = self._etcd() if member.kind == "etcd" else self._daemon(member)
            return process.spawn(command, record, member.log, environ=environ)
        with holder.take(self.config, member.name) as listener:
            descriptor = listener.fileno()
            command = [
                *(sys.executable, "-m", "hci.dev.activate", str(descriptor), "nbd"),
                *self._daemon(member),
            ]
            return process.spawn(
                command, record, member.log, environ=environ, pass_fds=[descriptor]
            )

    def _daemon(self, member: Member) -> list[str]:
        config = str(self.config.path)
        program = [sys.executable, "-m", "hci", member.kind, "serve"]
        return [*program, "--config", config, "--name", member.name]

    def _etcd(self) -> list[str]:
        program = shutil.which("etcd", path=f"{os.environ.get('PATH', '')}:/usr/bin:/usr/local/bin")
        if program is None:
            raise DevError(
                "there is no `etcd` program here; install etcd-server, or run `make setup`"
            )
        self.dev.etcd_data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        client, peer = self.config.cluster.etcd[0], self.dev.etcd_peer
        # It elects nobody but itself: waiting a second for others to speak up is of no use.
        options = {
            "heartbeat-interval": 50,
            "election-timeout": 250,
            "name": "dev",
            "data-dir": self.dev.etcd_data_dir,
            "listen-client-urls": f"http://{client}",
            "advertise-client-urls": f"http://{client}",
            "listen-peer-urls": f"http://{peer}",
            "initial-advertise-peer-urls": f"http://{peer}",
            "initial-cluster": f"dev=http://{peer}",
            "initial-cluster-token": self.config.cluster.id,
        }
        return [program, *(f"--{name}={value}" for name, value in options.items())]

    def _environ(self) -> dict[str, str]:
        """Ours, without what would change a member's mind or hand it somebody else's sockets."""
        skip = ("ETCD_", "LISTEN_", "HCI_CONFIG", "PYTHONPATH")
        environ = {name: value for name, value in os.environ.items() if not name.startswith(skip)}
        # The members run the code that runs here, also where it is not installed.
        return environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}

    def _start_holder(self) -> "subprocess.Popen[bytes] | None":
        """Start the holder, unless it runs; it answers when its socket is there."""
        running = process.read(self._record(HOLDER))
        if running is not None and running.is_alive:
            return None
        command = [sys.executable, "-m", "hci.dev.holder", "--config", str(self.config.path)]
        log = self.dev.log_dir / f"{HOLDER}.log"
        holder.address(self.config).unlink(missing_ok=True)
        return process.spawn(command, self._record(HOLDER), log, environ=self._environ())

    def _stop(self) -> list[str]:
        """The holder last, so that no guest is refused while its gateway closes."""
        killed: list[str] = []
        names = [[member.name for member in self.members if member.kind == kind] for kind in KINDS]
        for group in [*names, [HOLDER]]:
            found = {name: process.read(self._record(name)) for name in group}
            alive = {name: each for name, each in found.items() if each is not None}
            late = process.end(list(alive.values()), grace_s=STOP_GRACE_S)
            killed += [name for name, each in alive.items() if each in late]
            for name in group:
                self._record(name).unlink(missing_ok=True)
        shutil.rmtree(self.dev.run_dir, ignore_errors=True)
        return killed

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.folder / ".lock", "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DevError(
                    f"another `hci dev` command works on {self.folder}; wait for it to end"
                ) from None
            yield


KINDS = ("gateway", "node", "arbiter", "etcd")
"""In the order in which they stop."""

NODES = 3
"""As many as a pool of three replicas needs."""

NODES_WITH_ARBITER = 2
"""As many as a pool with a thin arbiter needs."""

GATEWAYS = 1

POOL = "vms"


def open_or_make(
    folder: Path,
    nodes: int | None,
    gateways: int | None,
    pool: str | None,
    *,
    arbiter: bool = False,
) -> DevCluster:
    """Return the cluster of a folder; where there is none, lay a new one out there.

    With `arbiter` it has a thin arbiter and its pool that policy. What is None may be anything
    where a cluster is there, and has its default in a new one.
    """
    path = folder / layout.CONFIG_NAME
    with ports.listed(layout.clusters_dir(), path) as taken:
        if not path.exists():
            _lay_out(path, nodes, gateways, pool or POOL, taken, arbiter=arbiter)
    cluster = DevCluster(config_file.load(path))
    if arbiter and not cluster.config.arbiters:
        raise DevError(
            f"the cluster in {folder} has no arbiter; leave --arbiter out, "
            "or start another cluster in another folder"
        )
    if pool not in (None, cluster.dev.pool):
        raise DevError(
            f"the cluster in {folder} was made with the pool {cluster.dev.pool}; leave --pool out, "
            f"and make another one with `hci pool create {pool}`"
        )
    for what, wanted, there in (
        ("nodes", nodes, len(cluster.config.nodes)),
        ("gateways", gateways, len(cluster.config.gateways)),
    ):
        if wanted not in (None, there):
            raise DevError(
                f"the cluster in {folder} has {there} {what}, not {wanted}; leave --{what} out, "
                "or start another cluster in another folder"
            )
    return cluster


def _lay_out(
    path: Path,
    nodes: int | None,
    gateways: int | None,
    pool: str,
    taken: Collection[int],
    *,
    arbiter: bool,
) -> None:
    """Write the configuration of a new cluster; where it would be wrong, not even its folder."""
    needed = NODES_WITH_ARBITER if arbiter else NODES
    if nodes is not None and nodes < needed:
        advice = "" if arbiter else "; two nodes do with --arbiter"
        raise DevError(
            f"the pool {pool} keeps {needed} copies, so a cluster has {needed} nodes "
            f"or more{advice}"
        )
    folder = path.parent
    try:
        os.fsencode(folder).decode()
    except UnicodeDecodeError:
        raise DevError(
            f"the name of {str(folder)!r} is not UTF-8, as its configuration has to be; "
            "choose another"
        ) from None
    count = (nodes or needed, gateways or GATEWAYS)
    text = layout.new_config(folder, *count, pool_name(pool), taken, arbiter=arbiter)
    config_file.parse(text, path)
    _make_folder(folder)
    layout.write(path, text)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        occupied = any(folder.iterdir())
    except OSError as error:
        raise DevError(f"cannot make {folder}: {error.strerror}") from error
    if occupied:
        raise DevError(f"{folder} is not empty and holds no cluster; choose another folder")
