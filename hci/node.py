"""The storage node's daemon: opens the store, serves it, registers in etcd, answers `hci`.

Data is served by the engine's threads, whether etcd answers or not; the main thread looks after
registration, what was deleted, and whether etcd may be believed. Nobody is served from a store of
which etcd has seen a later start, unless it goes on as one of which nothing counts.
"""

import os
import secrets
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import grpc
import structlog

from engine import VERSION, Node
from etcd import keys
from etcd.client import EtcdClient
from etcd.errors import EtcdError
from etcd.images import ImageRecord
from etcd.lease import Session
from etcd.records import NodeRecord
from hci import control, daemon, metrics, notify
from hci import control_pb2 as pb
from hci.config import Config, NodeConfig
from hci.control_pb2_grpc import NodeControlServicer, add_NodeControlServicer_to_server
from hci.errors import DaemonError
from hci.history import HistoryWatch, Holdings, held_record
from hci.known import known_parts
from hci.memory import forget_memory, memory_id
from hci.set_back import SetBackJudge
from hci.unusable_store import with_advice
from hci.usage import FolderUsage
from shard.digest import UNREADABLE, digest
from shard.errors import HciError
from shard.ids import ImageId, image_id
from vmstore.catalog import Catalog
from vmstore.errors import (
    ForeignStore,
    OtherCluster,
    RecordChanged,
    StoreBehind,
    StoreCopied,
    UnknownImage,
)
from vmstore.ledger import Ledger
from vmstore.set_back import Marks, seen_later

log = structlog.get_logger()

_FULL = "the disk is full: writes are refused until there is room"
RETRY_S = 1.0


def serve(config: Config, name: str) -> None:
    """Be the storage node `name` until told to stop. Raises DaemonError, ConfigError."""
    daemon.log_to_stderr()
    daemon.take_files()
    ending = daemon.Ending()
    NodeDaemon(config, config.node(name), ending).run()
    ending.raise_failure()


class NodeDaemon:
    """One storage node. Serves data as soon as its store is open, whether etcd answers or not."""

    def __init__(self, config: Config, own: NodeConfig, ending: daemon.Ending) -> None:
        self.config = config
        self.own = own
        self.ending = ending
        self.registered = False
        self.trouble = ""
        self._run = secrets.token_hex(16)
        self._listening = False
        self._marks = self._load_marks()
        self._opening = threading.RLock()
        self._engine = self._open_store()
        self.usage = FolderUsage(own.data_dir)
        self.etcd = EtcdClient([str(endpoint) for endpoint in config.cluster.etcd])
        self.catalog = Catalog(self.etcd)
        self._set_back_judge = SetBackJudge(self.catalog, ending)
        self.ledger = self._open_ledger()
        self.history = HistoryWatch(
            own.name, self.etcd, self.catalog, self.ledger, self._holdings, self._on_deleted
        )
        self._session: Session | None = None
        self._session_lost = threading.Event()
        self._unconfirmed: set[ImageId] = set()

    @property
    def engine(self) -> Node:
        """The data path. Whoever asks while the store is opened anew waits for that."""
        with self._opening:
            return self._engine

    def run(self) -> None:
        """Serve until it is time to end."""
        own = self.own
        try:
            server = control.server(
                own.name,
                own.control,
                lambda server: add_NodeControlServicer_to_server(NodeControl(self), server),
            )
        except HciError:
            self.engine.stop()
            raise
        try:
            self._judge_store()
            if self.ending.due:
                return
            self._listen()
            with metrics.served(f"node {own.name}", own.metrics, self._samples):
                log.info("node_started", node=own.name, instance=self.engine.start_counter,
                         listen=str(own.listen), version=VERSION)  # fmt: skip
                self._look_after()
                notify.attend(self.ending, self._look_after, self._ask_engine)
        finally:
            server.stop(grace=1).wait()
            if self._session is not None:
                self._session.close()
            self.etcd.close()
            self.engine.stop()
            self.ledger.close()
            log.info("node_stopped", node=own.name)

    def _open_store(self) -> Node:
        own = self.own
        try:
            own.data_dir.mkdir(parents=True, exist_ok=True)
            return Node(
                str(own.data_dir),
                cluster=self.config.cluster.id,
                name=own.name,
                new_store_id=secrets.token_hex(16),
                boot=memory_id(own.data_dir),
                log_bytes=own.log_bytes,
                seen_counter=self._marks.seen_counter,
                distrusted=sorted(self._marks.images),
                poll_us=own.poll_us,
            )
        except (OSError, RuntimeError) as error:
            why = with_advice(str(error))
            raise DaemonError(f"node {own.name} cannot use {own.data_dir}: {why}") from error

    def _load_marks(self) -> Marks:
        try:
            return Marks.load(self.own.data_dir / "set-back")
        except HciError as error:
            raise DaemonError(f"node {self.own.name}: {error}") from error

    def _judge_store(self) -> None:
        """Find out whether the store was set back before anybody is served from it.

        Where etcd does not answer it is found out when the node registers; by then nobody was given
        what others had flushed since, as its peers know the numbers of its flushes.
        """
        with suppress(EtcdError):
            while not self.ending.due and not self._may_serve():
                self.ending.wait(RETRY_S)

    def _may_serve(self) -> bool:
        """Whether the store is the latest that was seen, or goes on as one of which nothing counts.

        Raises EtcdError. Ends the process where it must not serve.
        """
        own = self._node_record()
        known = self.catalog.nodes().get(own.name)
        if known is None or not seen_later(known, own):
            return True
        self.trouble = self._set_back_judge.waits(known, own)
        if self.trouble:
            return False
        self._set_back(known.start_counter)
        return True

    def _set_back(self, seen_counter: int) -> None:
        """Go on as a new instance that says of all its images that nothing here counts."""
        log.warning("store_set_back", node=self.own.name, instance=self.engine.start_counter,
                    seen=seen_counter)  # fmt: skip
        held = {ImageId(each["image"]) for each in self.engine.inventory()["images"]}
        found = held | {ImageId(image) for image in self.engine.folders()} | self._marks.images
        self._marks.save(seen_counter, found)
        if self.ledger.start_counter(self.own.name) <= self.engine.start_counter:
            # As old as the store.
            self.ledger.forget()
        with self._opening:
            self._engine.stop()
            self._engine = self._open_store()
        if self._listening:
            self._listen()

    def _forget_marks(self) -> None:
        """Cross out images that a holder has begun to heal: the cluster's record says the rest."""
        if self._marks.images:
            left = {ImageId(image) for image in self.engine.inventory()["distrusted"]}
            if left != self._marks.images:
                self._marks.save(self._marks.seen_counter if left else 0, left)

    def _listen(self) -> None:
        own = self.own
        self._listening = True
        try:
            self.engine.listen_tcp(daemon.numeric(own.listen))
        except OSError as error:
            raise DaemonError(
                f"node {own.name} cannot listen at {own.listen}: {error.strerror or error}; "
                "is the port in use?"
            ) from error
        if own.socket is None:
            return
        try:
            own.socket.parent.mkdir(parents=True, exist_ok=True)
            self.engine.listen_unix(str(own.socket))
        except OSError as error:
            raise DaemonError(f"node {own.name} cannot listen at {own.socket}: {error}") from error

    def _look_after(self) -> None:
        failure = self.engine.failure()
        if failure is not None:
            forget_memory(self.own.data_dir)
            self.ending.fail(f"node {self.own.name}: {failure}")
            return
        if self._session_lost.is_set():
            self._session_lost.clear()
            self.registered = False
        try:
            self._forget_marks()
        except HciError as error:
            self.ending.fail(str(error))
            return
        if self.registered:
            self._check_history()
        if not self.registered:
            self._register()

    def _ask_engine(self) -> None:
        """Raise TimeoutError where the loop that serves data hangs."""
        self.engine.status()

    def _check_history(self) -> None:
        """Look now and then whether etcd may still be believed; else be registered no longer."""
        if self.ledger.start_counter(self.own.name) > self.engine.start_counter:
            copied = StoreCopied(self.own.name, self.engine.start_counter + 1)
            self.ending.fail(str(copied))
            return
        try:
            believed = self.history.check_if_due()
            if believed and self._unconfirmed:
                self._confirm_deleted()
        except EtcdError:
            # Heard of by the session too, where it lasts.
            return
        if not believed:
            self.registered = False
            if self._session is not None:
                self._session.close()
                self._session = None

    def _register(self) -> None:
        """Say in etcd who and where we are, and that we are alive; try again where it is away."""
        try:
            # First: to who knows one cluster, the records of any other are lost history.
            self.catalog.check_cluster(self.config.cluster.id)
            if not self._may_serve():
                self.ending.wait(RETRY_S)
                return
            if not self.history.check():
                self.trouble = self.history.lost
                self.ending.wait(RETRY_S)
                return
            self.catalog.init_cluster(self.config.cluster.id)
            if self._session is not None:
                self._session.close()
            self._session = session = Session(self.etcd, on_lost=self._session_lost.set)
            self.catalog.announce_node(self._node_record(), session.lease, self._run)
            session.start()
            self._bury_all()
        except (OtherCluster, ForeignStore, StoreBehind, StoreCopied) as error:
            self.ending.fail(str(error))
        except (EtcdError, RecordChanged) as error:
            if not self.trouble:
                log.warning("registration_waits", node=self.own.name, why=str(error))
            self.trouble = str(error)
            self.ending.wait(RETRY_S)
        else:
            self.registered, self.trouble = True, ""
            log.info("node_registered", node=self.own.name)

    def _node_record(self) -> NodeRecord:
        return NodeRecord(
            name=self.own.name,
            address=str(self.own.listen),
            control=str(self.own.control),
            socket=str(self.own.socket) if self.own.socket is not None else None,
            host=self.own.host,
            zone=self.own.zone,
            labels={},
            capacity_bytes=self.engine.status()["capacity_bytes"],
            store_id=self.engine.store_id,
            start_counter=self.engine.start_counter,
            run=self._run,
        )

    def _on_deleted(self, images: Iterable[ImageId]) -> None:
        """Images were deleted somewhere: their data goes here too."""
        for image in images:
            self.bury(image)

    def _bury_all(self) -> None:
        for image in self.catalog.tombstones():
            self.bury(image)
        self._confirm_deleted()

    def bury(self, image: ImageId) -> None:
        """Delete an image's data for ever; that it is done is said in etcd a moment later."""
        try:
            self.engine.delete(image)
        except (RuntimeError, TimeoutError) as error:
            log.error("delete_failed", node=self.own.name, image=image, why=str(error))
        else:
            self._unconfirmed.add(image)

    def _confirm_deleted(self) -> None:
        """Say in etcd which images are deleted here, so that their tombstones there may go."""
        for image in sorted(self._unconfirmed):
            with suppress(RecordChanged):  # By another node; next time.
                self.catalog.confirm_deleted(image, self.own.name)
                self._unconfirmed.discard(image)

    def contested(self) -> str:
        """Say for how many images this node knows better than the last recovery did."""
        contested = self.ledger.contested
        if not contested:
            return ""
        first = next(iter(contested.values()))
        more = f", and {len(contested) - 1} more images" if len(contested) > 1 else ""
        return f"it was not heard when etcd was recovered: {first}{more}; `hci cluster recover`"

    def unknown_images(self) -> list[pb.UnknownImage]:
        """Return the images with data here that etcd does not know and that were not deleted."""
        if self.engine.failure() is not None:
            return []
        records = self.ledger.records()
        holds = self.engine.inventory()
        held = {ImageId(each["image"]) for each in holds["images"]}
        # What an older copy of the disk brought back, and was deleted since, is among these.
        found = held | {ImageId(image) for image in self.engine.folders()}
        deleted = {ImageId(image) for image in holds["deleted"]}
        return [
            pb.UnknownImage(
                image_id=image,
                physical_bytes=self.engine.usage(image),
                why="" if image in held else "its record is gone",
            )
            for image in sorted(found - deleted)
            if keys.image(image) not in records and keys.tombstone(image) not in records
        ]

    def _holdings(self) -> Holdings:
        found = self.engine.inventory()
        # What was set back proves nothing.
        distrusted = set(found["distrusted"])
        held = {
            ImageId(each["image"]): each
            for each in found["images"]
            if each["image"] not in distrusted
        }
        return (
            {image: held_record(image, each) for image, each in held.items()},
            frozenset(ImageId(image) for image in found["deleted"]),
        )

    def _open_ledger(self) -> Ledger:
        try:
            return Ledger(self.own.data_dir / "ledger")
        except HciError as error:
            self.engine.stop()
            raise DaemonError(f"node {self.own.name}: {error}") from error

    def _samples(self) -> metrics.Samples:
        yield from node_samples(self.engine.status(), self.engine.failure(), self._known())
        gauge = metrics.gauge
        yield gauge("hci_node_history_lost", "1: etcd is behind what this node knows.",
                    int(bool(self.history.lost)))  # fmt: skip
        yield gauge("hci_node_contested_images", "Images that this node knows better than the last "
                    "recovery of etcd did.", len(self.ledger.contested))  # fmt: skip
        distrusted = [] if self.engine.failure() else self.engine.inventory()["distrusted"]
        yield gauge("hci_node_distrusted_images", "Images of which nothing here counts before it "
                    "is healed: the disk was set back.", len(distrusted))  # fmt: skip
        unknown = self.unknown_images()
        yield gauge("hci_node_unknown_images", "Images with data here that etcd does not know.",
                    len(unknown))  # fmt: skip
        yield gauge("hci_node_unknown_bytes", "Disk space of these images.",
                    sum(image.physical_bytes for image in unknown))  # fmt: skip

    def state(self) -> "pb.NodeStatus.State.ValueType":
        """Return the node's state."""
        if self.engine.failure() is not None:
            return pb.NodeStatus.STATE_FAILED
        if self.ending.due:
            return pb.NodeStatus.STATE_STOPPING
        return pb.NodeStatus.STATE_SERVING if self._known() else pb.NodeStatus.STATE_STARTING

    def _known(self) -> bool:
        """Whether etcd says that the node is alive, as far as that can be known."""
        return self.registered and not self.unheard()

    def unheard(self) -> str:
        """Say so where etcd may have forgotten the node since it answered last."""
        return daemon.unheard(self._session) if self.registered else ""


def node_samples(status: dict[str, Any], failure: str | None, registered: bool) -> metrics.Samples:
    """Return a node's metrics, from the engine's `status`."""
    gauge, counter, counts = metrics.gauge, metrics.counter, status["counters"]
    yield gauge("hci_node_up", "1: the store works; 0: it has failed.", int(failure is None))
    yield gauge("hci_node_registered", "1: known in etcd as alive.", int(registered))
    yield gauge("hci_node_capacity_bytes", "Of the store's file system.", status["capacity_bytes"])
    yield gauge("hci_node_free_bytes", "Of the store's file system.", status["free_bytes"])
    yield gauge("hci_node_images", "Images with data or a record here.", status["images"])
    yield gauge("hci_node_connections", "Data connections open now.", status["connections"])
    yield gauge("hci_node_log_bytes", "Of the write-ahead log in use.", status["log_bytes"])
    yield gauge("hci_node_full", "1: the disk is full, writes are refused.",
                int(status["no_space"]))  # fmt: skip
    yield gauge("hci_node_dirty_shards", "Shards in the dirty maps.", status["dirty_shards"])
    kinds = {(kind,): counts[kind] for kind in ("reads", "writes", "zeroes", "flushes")}
    yield counter("hci_node_requests_total", "Requests answered.", kinds, ["kind"])
    moved = {("read",): counts["read_bytes"], ("written",): counts["written_bytes"]}
    yield counter("hci_node_bytes_total", "Data of requests answered.", moved, ["direction"])
    yield counter("hci_node_copied_bytes_total", "Taken from other replicas by heal and "
                  "reconcile.", counts["copied_bytes"])  # fmt: skip
    yield counter("hci_node_pulled_bytes_total", "Of these, fetched from other nodes without a "
                  "gateway between.", counts["pulled_bytes"])  # fmt: skip
    yield counter("hci_node_served_to_peers_bytes_total", "Given to other nodes without a gateway "
                  "between.", counts["served_to_peers_bytes"])  # fmt: skip
    yield counter("hci_node_refused_total", "Requests answered with an error.", counts["refused"])
    yield counter("hci_node_bad_blocks_total", "Requests that met a block which does not match "
                  "its checksum.", counts["bad_blocks"])  # fmt: skip
    yield counter("hci_node_syncs_total", "Syncs of the log.", counts["syncs"])
    ended = {
        ("done",): counts["checkpoints"],
        ("no_space",): counts["checkpoints_without_space"],
    }
    yield counter("hci_node_checkpoints_total", "Checkpoints, by how they ended.", ended, ["end"])


class NodeControl(NodeControlServicer):
    """Answers `hci`."""

    def __init__(self, node: NodeDaemon) -> None:
        self._node = node

    def Status(self, request: pb.NodeStatusRequest, context: grpc.ServicerContext) -> pb.NodeStatus:
        node = self._node
        status = node.engine.status()
        return pb.NodeStatus(
            name=node.own.name,
            state=node.state(),
            trouble=node.engine.failure()
            or node.history.lost
            or node.trouble
            or node.unheard()
            or (_FULL if status["no_space"] else "")
            or node.contested(),
            version=VERSION,
            cluster_id=node.config.cluster.id,
            store_id=node.engine.store_id,
            start_counter=node.engine.start_counter,
            capacity_bytes=status["capacity_bytes"],
            used_bytes=node.usage.count() or 0,
            images=status["images"],
            connections=status["connections"],
            counters={
                "flush_number": status["flush_number"],
                "log_bytes": status["log_bytes"],
                "dirty_shards": status["dirty_shards"],
                **status["counters"],
                "pid": os.getpid(),
            },
            data_dir=str(node.own.data_dir),
            history_lost=bool(node.history.lost),
            unknown=node.unknown_images(),
        )

    def Known(
        self, request: pb.KnownRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.KnownPart]:
        node = self._node
        distrusted = frozenset(ImageId(image) for image in node.engine.inventory()["distrusted"])
        known = replace(node.history.known(), distrusted=distrusted)
        return known_parts(known, node.engine.store_id, node.engine.start_counter)

    def Usage(self, request: pb.UsageRequest, context: grpc.ServicerContext) -> pb.UsageReply:
        engine = self._node.engine
        ids = request.image_ids or [
            str(entry.image.record.id) for entry in self._node.catalog.images()
        ]
        return pb.UsageReply(physical_bytes={image: engine.usage(image) for image in ids})

    def Digest(
        self, request: pb.DigestRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.ShardDigest]:
        record = self._record(request.image_id)
        if record.epoch == 0:
            # Nobody has opened it yet, so no node has heard of it, and it is zeroes everywhere.
            return
        layers = [layer for layer in record.layer_ids if layer <= (request.layer or layer)]
        for shard in range(request.first_shard, request.first_shard + request.shards):
            try:
                content = self._node.engine.read_shard(record.id, layers, shard)
            except ValueError as error:
                context.abort(grpc.StatusCode.NOT_FOUND, str(error))
            except RuntimeError as error:
                if self._node.engine.failure() is not None:
                    raise
                log.error("shard_unreadable", node=self._node.own.name, image=record.id,
                          shard=shard, why=str(error))  # fmt: skip
                yield pb.ShardDigest(shard=shard, blake3=UNREADABLE)
                continue
            if content is not None:
                yield pb.ShardDigest(shard=shard, blake3=digest([content]))

    def _record(self, image: str) -> ImageRecord:
        return self._node.catalog.image(image_id(image)).record

    def Delete(self, request: pb.DeleteRequest, context: grpc.ServicerContext) -> pb.DeleteReply:
        image = image_id(request.image_id)
        if image not in self._node.catalog.tombstones():
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"image {image} was not deleted")
        try:
            freed = self._node.engine.usage(image)
        except (OSError, UnknownImage):
            freed = 0
        self._node.bury(image)
        return pb.DeleteReply(freed_bytes=freed)
