"""A gateway's decisions over an etcd in memory and an engine that a test speaks for."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from etcd.images import ImageRecord
from etcd.interface import Delete
from etcd.lease import Session
from etcd.memory import MemoryEtcd
from etcd.records import LeaseRecord
from tests.unit.samples import GIB, NODES, node_record
from vmstore.catalog import Catalog
from vmstore.exports import Exports
from vmstore.healing import HealLimits
from vmstore.names import ImageName, parse_image_name

WAIT_S = 20.0
"""A hang detector."""


class ScriptedEngine:
    """Remembers what it is told; nodes are there and answer unless a test says otherwise."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.known: dict[str, Any] | None = None
        """What nodes have of the record of an image that is opened."""
        self.parent_missing: set[int] = set()
        """Nodes that have not what a clone begins on."""
        self.closes = True
        """Whether an image that is closed gets rid of all it has to flush."""
        self._events: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._nodes: dict[int, list[str]] = {}

    def emit(self, event: str, **values: Any) -> None:
        self._events.put({"event": event, **values})

    def next_event(self, timeout_ms: int) -> dict[str, Any] | None:
        try:
            return self._events.get(timeout=timeout_ms / 1000)
        except queue.Empty:
            return None

    def open(self, channel: int, **values: Any) -> None:
        self._note("open", channel, **values)
        self._nodes[channel] = values["nodes"]
        for index in range(len(values["nodes"])):
            self.emit(
                "peeked",
                channel=channel,
                node=index,
                start_counter=1,
                flush_number=0,
                deleted=False,
                record=self.known,
                serial=1,
                parent_missing=index in self.parent_missing and values["parent"] is not None,
            )

    def admit(self, channel: int, nodes: list[tuple[int, int]], *, resume: bool) -> None:
        self._note("admit", channel, nodes, resume=resume)
        self.emit("admitted", channel=channel, levelling=[], shards=0)

    def close(self, channel: int) -> None:
        self._note("close", channel)
        if self.closes:
            self.emit("closed", channel=channel, clean=True)

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **values: self._note(name, *arguments, **values)

    def _note(self, name: str, /, *arguments: Any, **values: Any) -> None:
        self.calls.append((name, arguments, values))

    def named(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """The calls of one name, so far."""
        return [(arguments, values) for called, arguments, values in list(self.calls)
                if called == name]  # fmt: skip

    def answer_to(self, client: int) -> tuple[str, Any] | None:
        """("export", channel) or ("error", (kind, message)): the last answer to a client."""
        answers: list[tuple[str, Any]] = []
        for name, arguments, values in list(self.calls):
            if name == "answer_export" and arguments[0] == client:
                answers.append(("export", values["channel"]))
            elif name == "answer_error" and arguments[0] == client:
                answers.append(("error", arguments[1:]))
        return answers[-1] if answers else None


class ScriptedGateway:
    """One gateway that serves the image `vms/a`."""

    def __init__(self, **values: Any) -> None:
        self.etcd = MemoryEtcd()
        self.catalog = Catalog(self.etcd)
        self.engine = ScriptedEngine()
        self.name: ImageName = parse_image_name("vms/a")
        self.sessions: list[Session] = []
        self.failures: list[str] = []
        self.stopped = False
        self.holder = "a1" * 16
        self.exports = Exports(
            self.engine,  # type: ignore[arg-type]
            self.catalog,
            gateway="gateway1",
            holder=self.holder,
            local_node=lambda: None,
            lease=self._lease,
            heal_limits=HealLimits(),
            **values,
        )
        self.exports.failed = self.failures.append

    def _lease(self, on_lost: Callable[[], None], on_renewed: Callable[[float], None]) -> Session:
        session = Session(self.etcd, on_lost=on_lost, on_renewed=on_renewed)
        self.sessions.append(session)
        return session

    @property
    def record(self) -> ImageRecord:
        return self.catalog.find(self.name).record

    def lease_of_image(self) -> LeaseRecord | None:
        found = self.catalog.lease_of(self.record.id)
        return found.record if found is not None else None

    def connect(self, client: int, peer: str | None = None, name: str | None = None) -> None:
        """A client asks for the image, or for another one."""
        values = {"peer": peer} if peer is not None else {}
        asked_for = name or str(self.name)
        self.engine.emit("asked", client=client, query="go", name=asked_for, **values)

    def leave(self, client: int) -> None:
        self.engine.emit("client_gone", client=client)

    def answer(self, client: int) -> tuple[str, Any]:
        """What a client is answered, as soon as it is."""
        self.until(lambda: self.engine.answer_to(client) is not None, f"no answer to {client}")
        found = self.engine.answer_to(client)
        assert found is not None
        return found

    def until(self, holds: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + WAIT_S
        while not holds():
            assert not self.failures, self.failures
            assert time.monotonic() < deadline, what
            time.sleep(0.01)

    def leave_lease(self, *, lock: str | None) -> None:
        """Another process of a gateway of this name has the image, or died with it."""
        self.catalog.take_lease(
            self.catalog.find(self.name),
            gateway="gateway1",
            holder="d1" * 16,
            etcd_lease=self.etcd.grant_lease(1000),
            lock=lock,
        )

    def give_to_another_gateway(self, *, maintenance: bool = False) -> ImageRecord:
        """Another gateway takes the image over, as it may once our lease has ended."""
        lease = self.catalog.lease_of(self.record.id)
        if lease is not None:
            self.etcd.transaction([], [Delete(lease.key)])
        held = self.catalog.take_lease(
            self.catalog.find(self.name),
            gateway="gateway2",
            holder="ef" * 16,
            etcd_lease=self.etcd.grant_lease(10),
            maintenance=maintenance,
        )
        self.catalog.release(held, clean=True)
        return self.record

    def stop(self) -> None:
        """Stop it, as for a restart."""
        if not self.stopped:
            self.stopped = True
            self.exports.stop()

    @property
    def open_images(self) -> int:
        return len(self.exports.snapshot())


@contextmanager
def scripted_gateway(**values: Any) -> Iterator[ScriptedGateway]:
    gateway = ScriptedGateway(**values)
    for number in range(1, len(NODES) + 1):
        gateway.catalog.announce_node(node_record(number), gateway.etcd.grant_lease(1000))
    gateway.catalog.create_pool("vms")
    gateway.catalog.create_image(gateway.name, GIB)
    gateway.exports.start()
    try:
        yield gateway
    finally:
        gateway.engine.closes = True
        for image in gateway.exports.snapshot():
            gateway.engine.emit("closed", channel=image.channel, clean=True)
        gateway.stop()
        for session in gateway.sessions:
            session.close()
