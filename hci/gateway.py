"""The gateway's daemon: listens for NBD clients, keeps links to the nodes, answers `hci`.

Clients are served by the engine's thread, and what is decided about their images by that of
`Exports`; the main thread starts these, keeps links to the nodes that are registered, and sees to
what is due now and then. It serves nobody before etcd has answered.
"""

import os
import random
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import grpc
import structlog

from arbiter.client import Arbiters
from engine import VERSION, Gateway
from etcd import keys
from etcd.client import EtcdClient
from etcd.errors import EtcdError
from etcd.gateways import GatewayRecord
from etcd.interface import Notice, Reread
from etcd.lease import Session
from etcd.records import NodeRecord
from hci import control, daemon, metrics, notify
from hci import control_pb2 as pb
from hci.config import Config, GatewayConfig
from hci.control_pb2_grpc import GatewayControlServicer, add_GatewayControlServicer_to_server
from hci.errors import DaemonError
from hci.image_status import image_status
from shard.errors import HciError
from shard.ids import ImageId, image_id
from vmstore.caretaker import Caretaker
from vmstore.catalog import Catalog
from vmstore.errors import OtherCluster, UnknownImage
from vmstore.exports import Exports, Permission, Visitor
from vmstore.names import ImageName, SnapshotName
from vmstore.resizing import RESIZE_LIMIT_S
from vmstore.scrubbing import Scrubber
from vmstore.served import Served, ServedFile
from vmstore.snapshot_errors import RemovalUnknown, RollbackUnknown, SnapshotUnknown
from vmstore.snapshots import SNAPSHOT_LIMIT_S

if TYPE_CHECKING:
    from hci.tls import Credentials

log = structlog.get_logger()

BACKLOG = 128


def serve(config: Config, name: str) -> None:
    """Be the gateway `name` until told to stop. Raises DaemonError, ConfigError."""
    daemon.log_to_stderr()
    daemon.take_files()
    ending = daemon.Ending()
    own = config.gateway(name)
    # Held until this process dies: its leases may be taken over by whoever gets it next.
    lock = daemon.take_lock(own.run_dir / "gateway.lock")
    try:
        GatewayDaemon(config, own, ending, daemon.lock_id(lock)).run()
    finally:
        lock.close()
    ending.raise_failure()


class GatewayDaemon:
    """One gateway."""

    def __init__(
        self, config: Config, own: GatewayConfig, ending: daemon.Ending, lock: str
    ) -> None:
        self.config = config
        self.own = own
        self.ending = ending
        self.holder = secrets.token_hex(16)
        self.serving = False
        self.trouble = ""
        self.etcd = EtcdClient([str(endpoint) for endpoint in config.cluster.etcd])
        self.catalog = Catalog(self.etcd)
        self.engine = Gateway(poll_us=own.poll_us)
        self._nodes_changed = threading.Event()
        self._local_node: str | None = None
        self._arbiters = Arbiters()
        served = ServedFile(own.run_dir / "served.json")
        self._served = Served(self.holder, file=served, boot=daemon.boot_id())
        self.exports = Exports(
            self.engine,
            self.catalog,
            gateway=own.name,
            holder=self.holder,
            local_node=lambda: self._local_node,
            lease=self._lease,
            served=self._served,
            voters=self._arbiters,
            lock=lock,
            heal_limits=config.heal,
            slow_limits=config.slow,
            permitted=self._permitted,
        )
        self.credentials = self._credentials()
        self._session: Session | None = None
        self._not_announced = ""
        self._announced: int | None = None
        """The etcd lease under which others know this gateway."""
        self.exports.failed = ending.fail
        self.caretaker = Caretaker(
            self.catalog, self.exports.maintain, self.exports.maintained, random.SystemRandom()
        )
        self.scrubber = Scrubber(
            self.catalog,
            self.exports,
            self.exports.rot_log,
            self.scrub_of,
            config.scrub,
            random.SystemRandom(),
        )

    def run(self) -> None:
        """Serve until it is time to end."""
        own = self.own
        server = control.server(
            own.name,
            own.control,
            lambda server: add_GatewayControlServicer_to_server(GatewayControl(self), server),
        )
        try:
            sockets = self._sockets()
            with metrics.served(f"gateway {own.name}", own.metrics, self._samples):
                self._serve(sockets)
        finally:
            server.stop(grace=1).wait()
            self.engine.stop()
            self.etcd.close()
            log.info("gateway_stopped", gateway=own.name)

    def _serve(self, sockets: list[socket.socket]) -> None:
        if not self._wait_for_etcd():
            return
        limits = self.own.limits
        self.engine.limit(
            clients=limits.clients_max,
            client_bytes=limits.client_bytes_in_flight,
            total_bytes=limits.bytes_in_flight,
            handshake_ms=limits.handshake_timeout_s * 1000,
            idle_ms=limits.idle_timeout_s * 1000,
        )
        if self.credentials is not None:
            self.credentials.load()
        for listening in sockets:
            mode = self._tls_mode(listening)
            self.engine.listen(listening.detach(), mode)
        self.serving = True
        own = self.own
        log.info("gateway_started", gateway=own.name, holder=self.holder,
                 socket=str(own.nbd_socket), version=VERSION)  # fmt: skip
        notify.attend(self.ending, self._look_after, self.engine.snapshot)
        self.exports.stop()

    def _lease(self, on_lost: Callable[[], None], on_renewed: Callable[[float], None]) -> Session:
        self._session = Session(self.etcd, on_lost=on_lost, on_renewed=on_renewed)
        return self._session

    def _announce(self) -> None:
        """Have `hci` on any host find this gateway, also under a new etcd lease."""
        session = self._session
        if session is None or session.lost or session.lease == self._announced:
            return
        record = GatewayRecord(
            name=self.own.name,
            host=self.own.host,
            control=str(self.own.control),
            holder=self.holder,
        )
        self.catalog.announce_gateway(record, session.lease)
        self._announced = session.lease

    def unannounced(self) -> str:
        """Say so where etcd, and whoever asks it, may not know this gateway, which serves."""
        if not self.serving or self._session is None:
            return ""
        return self._not_announced or daemon.unheard(self._session)

    @property
    def _registered(self) -> bool:
        """Whether etcd knows this gateway, as far as that can be known."""
        session = self._session
        announced = session is not None and session.lease == self._announced
        return announced and not daemon.unheard(session)

    def _sockets(self) -> list[socket.socket]:
        """Return the sockets that NBD clients connect to. Raises DaemonError.

        Those that a supervisor holds outlive this process: clients that connect between it and the
        next one wait in them.
        """
        given = daemon.activated_sockets()
        unix = [each for each in given if each.family == socket.AF_UNIX]
        tcp = [each for each in given if each.family in (socket.AF_INET, socket.AF_INET6)]
        if len(unix) + len(tcp) < len(given):
            raise DaemonError("a socket in LISTEN_FDS is neither a unix socket nor TCP")
        if not unix:
            unix = [self._bind_unix()]
        if not tcp and self.own.nbd_listen is not None:
            tcp = [self._bind_tcp()]
        return unix + tcp

    def _tls_mode(self, listening: socket.socket) -> str:
        if self.own.tls is None:
            return "off"
        return self.own.tls.socket if listening.family == socket.AF_UNIX else self.own.tls.tcp

    def _credentials(self) -> "Credentials | None":
        if self.own.tls is None:
            return None
        from hci.tls import Credentials  # X.509 takes a while to import.

        return Credentials(self.own.tls, self.engine, time.monotonic)

    def _permitted(self, visitor: Visitor, image: str) -> Permission:
        """Return what a client may do with an image."""
        allowed = Permission.WRITE
        if not visitor.trusted and self.own.tls is not None:
            from hci import tls

            names = tls.identities(visitor.certificate)
            allowed = tls.permission(names, image, self.own.tls.access)
        return min(allowed, Permission.READ) if self.own.is_read_only(image) else allowed

    def _bind_unix(self) -> socket.socket:
        path = self.own.nbd_socket
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # We hold the gateway's lock: a socket file that is there was left by a dead process.
            path.unlink(missing_ok=True)
            listening = socket.socket(socket.AF_UNIX)
            listening.bind(str(path))
            listening.listen(BACKLOG)
        except OSError as error:
            name = self.own.name
            raise DaemonError(f"gateway {name} cannot listen at {path}: {error}") from error
        return listening

    def _bind_tcp(self) -> socket.socket:
        address = self.own.nbd_listen
        assert address is not None
        try:
            family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
            return socket.create_server(
                (address.host, address.port), family=family, backlog=BACKLOG
            )
        except OSError as error:
            raise DaemonError(
                f"gateway {self.own.name} cannot listen at {address}: {error.strerror or error}; "
                "is the port in use?"
            ) from error

    def _wait_for_etcd(self) -> bool:
        """Begin as soon as etcd answers; return False if told to end before."""
        steps = (
            lambda: self.catalog.init_cluster(self.config.cluster.id),
            self.exports.start,
            self._announce,
            lambda: self.etcd.watch(keys.NODES, self._on_nodes),
            lambda: self.etcd.watch(keys.LOST, self._on_mark),
            self.caretaker.watch,
            self.scrubber.watch,
            self._link_nodes,
        )
        try:
            taken = daemon.take_steps(steps, self.ending, self._start_waits)
        except OtherCluster as error:
            raise DaemonError(str(error)) from error
        if taken < len(steps):
            if taken > steps.index(self.exports.start):
                self.exports.stop()
            return False
        self.trouble = ""
        return True

    def _start_waits(self, error: EtcdError) -> None:
        if not self.trouble:
            log.warning("start_waits", gateway=self.own.name, why=str(error))
        self.trouble = str(error)

    def _on_nodes(self, _notice: Notice) -> None:
        self._nodes_changed.set()

    def _on_mark(self, notice: Notice) -> None:
        """etcd was found to have lost history, or it was recovered."""
        items = notice.items if isinstance(notice, Reread) else notice.changes
        if not any(item.value is not None for item in items):
            self.exports.look_again()

    def _look_after(self) -> None:
        if self.credentials is not None:
            self.credentials.look()
        self.caretaker.look(time.monotonic())
        self.scrubber.look(time.monotonic(), time.time_ns() // 1_000_000)
        try:
            self._announce()
            self._not_announced = ""
        except EtcdError as error:
            if not self._not_announced:
                log.warning("gateway_not_announced", gateway=self.own.name, why=str(error))
            self._not_announced = str(error)
        if not self._nodes_changed.is_set():
            return
        self._nodes_changed.clear()
        try:
            self._link_nodes()
        except EtcdError as error:
            log.warning("nodes_unknown", why=str(error))
            self._nodes_changed.set()

    def _link_nodes(self) -> None:
        """Keep a connection to every node that is registered; the same host's by its socket."""
        for node in self.catalog.nodes().values():
            try:
                self._link(node)
            except OSError as error:
                log.warning("node_address_unknown", node=node.name, why=str(error))

    def _link(self, node: NodeRecord) -> None:
        local = node.host == self.own.host
        if local:
            self._local_node = node.name
        self.engine.link(
            node.name,
            cluster=self.config.cluster.id,
            gateway=self.own.name,
            address=daemon.numeric(node.address),
            socket=node.socket if local else None,
        )

    def of_engine(self) -> dict[int, dict[str, Any]]:
        """Return what the engine says of its images, by channel."""
        try:
            images = self.engine.snapshot()["images"]
        except RuntimeError:
            # Stopped, or about to be.
            return {}
        return {image["channel"]: image for image in images}

    def scrub_of(self, image: ImageId) -> dict[str, Any] | None:
        """Return how far the scrub of an image is that is open here."""
        found = [open_image for open_image in self.exports.snapshot() if open_image.image == image]
        state = self.of_engine().get(found[0].channel) if found else None
        return state["scrub"] if state is not None else None

    def _samples(self) -> metrics.Samples:
        """Return the gateway's metrics."""
        seen = self.engine.snapshot()
        of_engine = {image["channel"]: image for image in seen["images"]}
        gauge, counter = metrics.gauge, metrics.counter
        yield gauge("hci_gateway_up", "1: serves; 0: is starting or stopping.", int(self.serving))
        yield gauge("hci_gateway_registered", "1: known in etcd as there.",
                    int(self._registered))  # fmt: skip
        yield gauge("hci_gateway_clients", "NBD connections open now.", len(seen["clients"]))
        yield gauge("hci_gateway_snapshots_open", "Snapshots that clients read here.",
                    self.exports.snapshots_open())  # fmt: skip
        yield counter("hci_gateway_clients_refused_total", "NBD connections closed as they came, "
                      "for there were `clients_max`.", seen["refused_clients"])  # fmt: skip
        yield gauge("hci_gateway_bytes_in_flight", "Kept in memory for clients' requests.",
                    seen["bytes_in_flight"])  # fmt: skip
        links = {(node,): int(ready) for node, ready in seen["links"]}
        yield gauge("hci_gateway_link_up", "1: the node answers.", links, ["node"])
        arbiters = {(name,): int(well) for name, well in self._arbiters.answering().items()}
        yield gauge("hci_gateway_arbiter_up", "1: the arbiter answered when it was asked last.",
                    arbiters, ["arbiter"])  # fmt: skip
        fenced = self._served.fenced()
        yield counter("hci_gateway_images_lost_total", "Times that an image was found to be "
                      "another gateway's.", fenced.images)  # fmt: skip
        yield counter("hci_gateway_processes_barred_total", "Processes of clients that had such "
                      "an image, and get errors.", fenced.barred)  # fmt: skip
        yield counter("hci_gateway_processes_refused_total", "Times that such a process was not "
                      "let in again.", fenced.refused)  # fmt: skip
        images = [(str(image.name), image) for image in self.exports.snapshot()]
        states = {
            (name,): float(image_status(image, {}, self.exports).state) for name, image in images
        }
        yield gauge("hci_image_state", "1 opening, 2 serving, 3 writes wait, 4 stalled, 5 closing.",
                    states, ["image"])  # fmt: skip
        stale: dict[tuple[str, ...], float] = {}
        generations: dict[tuple[str, ...], float] = {}
        for name, image in images:
            record = image.holder.record
            if record is not None:
                generations[(name,)] = record.generation
                nodes = [node for of_set in record.stale.values() for node in of_set]
                stale.update({(name, node): nodes.count(node) for node in nodes})
        yield gauge("hci_image_generation", "Grows with each change of the nodes in sync.",
                    generations, ["image"])  # fmt: skip
        yield gauge("hci_image_stale", "Replica sets in which the node is stale.",
                    stale, ["image", "node"])  # fmt: skip
        asked = [(n, of_engine[i.channel]) for n, i in images if i.channel in of_engine]
        waiting = {(name,): found["requests_in_flight"] for name, found in asked}
        yield gauge("hci_image_requests_in_flight", "Requests under way.", waiting, ["image"])
        kinds = {
            (name, kind): found["counters"][kind]
            for name, found in asked
            for kind in ("reads", "writes", "zeroes", "flushes", "failures")
        }
        yield counter("hci_image_requests_total", "Clients' requests answered since the image was "
                      "opened.", kinds, ["image", "kind"])  # fmt: skip
        behind = {(name,): float(image.behind) for name, image in images}
        yield gauge("hci_image_history_lost", "1: etcd is behind what the gateway knows.",
                    behind, ["image"])  # fmt: skip
        refusing = {(name,): len(image.refusing) for name, image in images}
        yield gauge("hci_image_sets_refusing_writes", "Replica sets whose disks are full, where "
                    "clients are told so.", refusing, ["image"])  # fmt: skip
        waits = {(name,): float(bool(image.holder.trouble)) for name, image in images}
        yield gauge("hci_image_waits", "1: for etcd, an arbiter or a node; `hci status` says "
                    "which.", waits, ["image"])  # fmt: skip
        ended = self.exports.heal_log.totals()
        yield counter("hci_heals_total", "Heals since the gateway started, by how they ended.",
                      {("done",): ended.done, ("failed",): ended.failed}, ["end"])  # fmt: skip
        yield counter("hci_heal_copied_bytes_total", "Copied by the heals that are done.",
                      ended.copied_bytes)  # fmt: skip
        yield counter("hci_gateway_pulls_unreached_total", "Times that a node (target) could not "
                      "fetch what it lacked from another one (source), and had it through here.",
                      dict(self.exports.heal_log.pulls_unreached()),
                      ["source", "target"])  # fmt: skip
        heals = {
            (name, found["heal"]["node"]): found["heal"] for name, found in asked if found["heal"]
        }
        yield gauge("hci_heal_bytes_left", "Of the heals under way, estimated.",
                    {who: heal["bytes_left"] for who, heal in heals.items()},
                    ["image", "node"])  # fmt: skip
        yield gauge("hci_heal_bytes_done", "Copied by the heals under way.",
                    {who: heal["bytes_done"] for who, heal in heals.items()},
                    ["image", "node"])  # fmt: skip
        yield gauge("hci_levelling_shards_left", "Shards that replicas in sync are still made "
                    "equal in, after an unclean end or the return of a node.",
                    {(name,): found["level"]["shards_left"] for name, found in asked
                     if found["level"]}, ["image"])  # fmt: skip
        yield counter("hci_image_rot_blocks_total", "Blocks found damaged, repaired, given up or "
                      "undecided since the gateway started.",
                      dict(self.exports.rot_log.counts()), ["image", "kind"])  # fmt: skip
        yield gauge("hci_image_unrepairable_blocks", "Damaged on every node in sync.",
                    {(name,): len(found["rot"]["unrepairable"]) for name, found in asked},
                    ["image"])  # fmt: skip
        slow = {
            (name, node): lag_ms / 1000
            for name, image in images
            for node, lag_ms in image.holder.slowness.slow().items()
        }
        yield gauge("hci_image_replica_lag_seconds", "How much later than the quickest a node "
                    "answers that is slow.", slow, ["image", "node"])  # fmt: skip
        yield counter("hci_image_slow_replicas_left_behind_total", "Nodes left behind because they "
                      "were too slow, since the image was opened.",
                      {(name,): image.slow_left_behind for name, image in images},
                      ["image"])  # fmt: skip
        yield counter("hci_image_writes_lost_total", "Times that answered, unflushed writes went "
                      "with the power of all nodes in sync, since the image was opened.",
                      {(name,): image.writes_lost for name, image in images},
                      ["image"])  # fmt: skip
        scrubs = {(name,): found["scrub"] for name, found in asked if found["scrub"]}
        yield gauge("hci_scrub_shards_left", "Of the scrubs under way.",
                    {who: scrub["shards_left"] for who, scrub in scrubs.items()},
                    ["image"])  # fmt: skip
        yield gauge("hci_scrub_read_bytes", "Read of each node by the scrubs under way.",
                    {who: scrub["read_bytes"] for who, scrub in scrubs.items()},
                    ["image"])  # fmt: skip
        known = self.scrubber.known()
        yield gauge("hci_scrub_finished_timestamp_seconds", "When the last scrub was through, in "
                    "seconds since 1970; 0: none was.",
                    {(name,): record.finished_ms / 1000 for name, record in known.items()},
                    ["image"])  # fmt: skip
        bad = {
            (name, kind): float(blocks)
            for name, record in known.items()
            for kind, blocks in (
                ("unrepairable", record.last.unrepairable),
                ("undecided", record.last.undecided),
            )
        }
        yield gauge("hci_scrub_bad_blocks", "What the last scrub left damaged or undecided.",
                    bad, ["image", "kind"])  # fmt: skip
        moved = {
            (name, direction): found["counters"][f"{direction}_bytes"]
            for name, found in asked
            for direction in ("read", "written")
        }
        yield counter("hci_image_bytes_total", "Clients' data since the image was opened.",
                      moved, ["image", "direction"])  # fmt: skip

    def state(self) -> "pb.GatewayStatus.State.ValueType":
        """Return the gateway's state."""
        if self.ending.due:
            return pb.GatewayStatus.STATE_STOPPING
        return pb.GatewayStatus.STATE_SERVING if self.serving else pb.GatewayStatus.STATE_STARTING


class GatewayControl(GatewayControlServicer):
    """Answers `hci`."""

    def __init__(self, gateway: GatewayDaemon) -> None:
        self._gateway = gateway

    def Status(
        self, request: pb.GatewayStatusRequest, context: grpc.ServicerContext
    ) -> pb.GatewayStatus:
        gateway = self._gateway
        seen = gateway.of_engine()
        return pb.GatewayStatus(
            name=gateway.own.name,
            holder_id=gateway.holder,
            host=gateway.own.host,
            state=gateway.state(),
            trouble=gateway.trouble or gateway.unannounced(),
            version=VERSION,
            images=[
                image_status(image, seen.get(image.channel, {}), gateway.exports)
                for image in gateway.exports.snapshot()
            ],
            counters={"pid": os.getpid(), "snapshots_open": gateway.exports.snapshots_open()},
            finished_heals=[
                pb.FinishedHeal(
                    image_id=heal.image,
                    name=heal.name,
                    node=heal.node,
                    copied_bytes=heal.bytes_done,
                    bytes_per_second=heal.bytes_per_second,
                    bad_blocks=heal.bad_blocks,
                    finished_at=heal.finished_at or 0.0,
                )
                for heal in gateway.exports.heal_log.finished()
            ],
        )

    def _name(self, image: str) -> ImageName:
        wanted = image_id(image)
        entries = self._gateway.catalog.images()
        names = [entry.name for entry in entries if entry.image.record.id == wanted]
        if not names:
            raise UnknownImage(image)
        return names[0]

    def Snapshot(
        self, request: pb.SnapshotRequest, context: grpc.ServicerContext
    ) -> pb.SnapshotReply:
        name = SnapshotName(self._name(request.image_id), request.name)
        try:
            taken = self._gateway.exports.take_snapshot(name.image, name.name, int(time.time()))
        except SnapshotUnknown as error:
            context.abort(grpc.StatusCode.ABORTED, str(error))
        except TimeoutError:
            why = f"nothing came of it within {SNAPSHOT_LIMIT_S:.0f} s"
            context.abort(grpc.StatusCode.ABORTED, str(SnapshotUnknown(str(name), why)))
        snapshot = taken.snapshot
        return pb.SnapshotReply(
            layer=snapshot.layer,
            size_bytes=snapshot.size_bytes,
            created_s=snapshot.created_s,
            held_ms=taken.held_ms,
        )

    def Rollback(
        self, request: pb.RollbackRequest, context: grpc.ServicerContext
    ) -> pb.RollbackReply:
        name = SnapshotName(self._name(request.image_id), request.name)
        exports = self._gateway.exports
        try:
            done = exports.roll_back(name.image, name.name, force=request.force)
        except RollbackUnknown as error:
            context.abort(grpc.StatusCode.ABORTED, str(error))
        except TimeoutError:
            why = f"nothing came of it within {SNAPSHOT_LIMIT_S:.0f} s"
            context.abort(grpc.StatusCode.ABORTED, str(RollbackUnknown(str(name), why)))
        return pb.RollbackReply(
            created_s=done.snapshot.created_s,
            size_bytes=done.snapshot.size_bytes,
            former_bytes=done.former_bytes,
            dropped=[each.name for each in done.dropped],
        )

    def RemoveSnapshot(
        self, request: pb.RemoveSnapshotRequest, context: grpc.ServicerContext
    ) -> pb.RemoveSnapshotReply:
        name = SnapshotName(self._name(request.image_id), request.name)
        try:
            layer = self._gateway.exports.remove_snapshot(name.image, name.name)
        except RemovalUnknown as error:
            context.abort(grpc.StatusCode.ABORTED, str(error))
        except TimeoutError:
            why = f"nothing came of it within {SNAPSHOT_LIMIT_S:.0f} s"
            context.abort(grpc.StatusCode.ABORTED, str(RemovalUnknown(str(name), why)))
        return pb.RemoveSnapshotReply(layer=layer)

    def ConfirmSnapshot(
        self, request: pb.ConfirmSnapshotRequest, context: grpc.ServicerContext
    ) -> pb.ConfirmSnapshotReply:
        name = SnapshotName(self._name(request.image_id), request.name)
        try:
            layer = self._gateway.exports.confirm_snapshot(name.image, name.name)
        except TimeoutError as error:
            raise HciError(
                f"the nodes of {name.image} had not stored {name.name} after "
                f"{SNAPSHOT_LIMIT_S:.0f} s; `hci status` says what is missing"
            ) from error
        return pb.ConfirmSnapshotReply(layer=layer)

    def Resize(self, request: pb.ResizeRequest, context: grpc.ServicerContext) -> pb.ResizeReply:
        name = self._name(request.image_id)
        try:
            told_before = self._gateway.exports.resize(
                name, request.size_bytes, force=request.force, reconnect=request.reconnect
            )
        except TimeoutError as error:
            raise HciError(
                f"image {name} is still being resized after {RESIZE_LIMIT_S:.0f} s, and that "
                "goes on; `hci image info` says when it has its new size"
            ) from error
        return pb.ResizeReply(size_bytes=request.size_bytes, connections_to_renew=told_before)
