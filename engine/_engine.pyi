"""Types of the Rust module. `make check` compares this file with the module, both ways."""

from typing import Any, Final, final

__all__ = ["VERSION", "Gateway", "Node", "Simulation"]

VERSION: Final[str]
"""Version of the engine, the same as the distribution's."""

@final
class Gateway:
    """The event loop of a gateway. Methods return at once; `next_event` tells what came of them.

    Nodes of an image are named by their index in the `nodes` that it was opened with. Every method
    raises RuntimeError once the gateway is stopped, and ValueError for what makes no sense.
    Its loop polls for `poll_us` at most before it sleeps.
    """

    def __new__(cls, *, poll_us: int = 0) -> Gateway: ...
    def listen(self, fd: int, tls: str = "off") -> None:
        """Take over a listening socket, by descriptor. `tls`: off, optional or required."""

    def set_tls(
        self, *, certificate: bytes, key: bytes, client_authorities: bytes | None = None
    ) -> None:
        """Show this certificate to connections that begin with TLS from now on; all in PEM.

        With `client_authorities` clients must have a certificate that one of these has signed.
        Raises ValueError where they cannot be used.
        """

    def stop_listening(self) -> None:
        """Let connections that arrive from now on wait in the socket."""

    def limit(
        self,
        *,
        clients: int,
        client_bytes: int,
        total_bytes: int,
        handshake_ms: int,
        idle_ms: int,
    ) -> None:
        """Bound what NBD clients may have: connections, bytes under way each and in all, time.

        One that asks for nothing for `idle_ms` is sent away; 0: nobody is.
        """

    def link(
        self, node: str, *, cluster: str, gateway: str, address: str, socket: str | None = None
    ) -> None:
        """Keep a connection to a node. `address`: numeric host and port."""

    def unlink(self, node: str) -> None:
        """Keep it no longer."""

    def open(
        self,
        channel: int,
        *,
        image: str,
        size_bytes: int,
        shard_bytes: int,
        placement_key: str,
        layers: list[int],
        snapshots: list[tuple[int, int]],
        merging: list[int],
        epoch: int,
        holder: str,
        generation: int,
        digest: bytes,
        body: bytes,
        nodes: list[str],
        sets: list[list[int]],
        in_sync: list[list[int]],
        local: int | None = None,
        levelling: tuple[int, int, int] | None = None,
    ) -> None:
        """Begin with an image: its nodes are asked for their records (`peeked`).

        `levelling` is what levelling in the background may take: bytes in a second (0: no limit),
        shards at once, and percent of the time beside clients.
        """

    def peek(self, channel: int, node: int) -> None:
        """Ask a node that waits to be admitted for its record again."""

    def admit(self, channel: int, nodes: list[tuple[int, int]], *, resume: bool) -> None:
        """Let nodes in: at once (`resume`), or after their dirty maps are known (`admitted`).

        The latter are made level on demand and in the background (`levelled`, one by one).
        Each node with the `serial` of its last `peeked`; one that was asked again since stays out.
        """

    def reconfigure(
        self,
        channel: int,
        *,
        generation: int,
        digest: bytes,
        body: bytes,
        in_sync: list[list[int]],
        layers: list[int],
        snapshots: list[tuple[int, int]],
        merging: list[int],
    ) -> None:
        """Go by a new record; `stored` tells that the nodes in sync hold it.

        Other layers than before only while the image is frozen; as its nodes in sync have stored
        them, what waited goes on, to the new top.
        `snapshots` names the layer of each and the generation of the record that froze it.
        `merging` are layers below the top one, falling, that no snapshot names: nodes merge them
        into the one above by themselves, whether or not the image is frozen as that begins.
        """

    def freeze(self, channel: int, attempt: int) -> None:
        """Have clients' writes, zeroes and flushes wait for a snapshot (`frozen`, `freeze_failed`).

        `frozen`: no write is in flight, and all is durable on the nodes in sync. It stays so until
        `thaw`, or `reconfigure` with other layers. `freeze_failed`, with `why`, at once where not
        all nodes in sync are up and level; when one is lost before `frozen`, or two seconds were
        not enough; then what waited goes on.
        """

    def thaw(self, channel: int, attempt: int) -> None:
        """End that freeze under the layers of before; nothing where it is over."""

    def ask_emptied(self, channel: int) -> None:
        """Ask every node that is connected, in sync or not, which `merging` layers it has emptied.

        Each answers with `emptied`: `node`, and `layers` of which it has nothing any more, durably.
        When all nodes of the image have said so of a layer it may go from the record. `peeked`
        says the same, in `record`.
        """

    def refuse_writes(self, channel: int, sets: list[int]) -> None:
        """Tell clients of these replica sets, and only these, that there is no room for writes."""

    def heal(
        self,
        channel: int,
        *,
        node: int,
        serial: int,
        attempt: int,
        sets: list[tuple[int, int]],
        bytes_per_second: int,
        shards_at_once: int,
        share_percent: int,
    ) -> None:
        """Make a stale node level (`healed`, or `heal_failed`).

        `serial` is that of its last `peeked`, `attempt` is given back in the events, `sets` says
        since which generation the node is stale in which replica sets. 0 bytes: no limit.
        The limits are those of all heals, and of levelling, of this gateway together; where they
        differ the strictest hold. While clients of any image ask for something these work
        `share_percent` of the time.
        """

    def writes_lost(self, channel: int, sets: list[int]) -> None:
        """Have the next flush of a client fail.

        What the holder before answered in these replica sets may be gone, and its clients live on.
        """

    def end_heal(self, channel: int, attempt: int) -> None:
        """Give that heal up; the node stays stale."""

    def scrub(
        self,
        channel: int,
        *,
        attempt: int,
        from_shard: int,
        end_shard: int | None,
        bytes_per_second: int,
        share_percent: int,
    ) -> None:
        """Read and compare all replicas in sync from a shard on, up to another (`scrub_ended`).

        At most `bytes_per_second` on each node (0: no limit), and `share_percent` of the time while
        clients of any image ask for something, for all scrubs of this gateway together.
        """

    def end_scrub(self, channel: int, attempt: int) -> None:
        """End that scrub before it is through."""

    def set_lease_deadline(self, channel: int, deadline_ns: int) -> None:
        """Past this time of CLOCK_BOOTTIME reads need the nodes' word for our epoch."""

    def resize(self, channel: int, size_bytes: int, body: bytes) -> None:
        """Show the new size to clients that connect from now on; the nodes keep the record."""

    def zero(self, channel: int, offset: int, length: int) -> None:
        """Make a range read as zeroes (`zeroed`)."""

    def disconnect(self, channel: int) -> None:
        """End the connections of an image's clients, without answers."""

    def reconnect(self, channel: int) -> None:
        """End them too, each when what it has asked for is answered."""

    def open_reader(
        self,
        channel: int,
        *,
        image: str,
        size_bytes: int,
        shard_bytes: int,
        placement_key: str,
        snapshot: tuple[int, int],
        nodes: list[str],
        sets: list[list[int]],
        in_sync: list[list[int]],
        local: int | None = None,
    ) -> None:
        """Read a snapshot, by its layer and the generation of the record that froze it.

        It is read from `in_sync`: nodes that were in sync then, or were healed since.
        `reader_open` once a node of each replica set serves it, else `reader_failed` with `why`,
        after five seconds, or as soon as the image is deleted. That may also come later, where no
        node of a set has the snapshot any more; then every request fails. It needs no lease.
        `close`, `kill`, `forget`, `disconnect` and `reconnect` are as for an image.
        """

    def close(self, channel: int) -> None:
        """Flush, clear, let go, or end a reader (`closed`)."""

    def kill(self, channel: int) -> None:
        """End an image at once; its requests fail."""

    def forget(self, channel: int) -> None:
        """Drop an image that is closed or killed."""

    def answer_names(self, client: int, names: list[str]) -> None:
        """Answer a client that asked for the list of exports."""

    def answer_snapshots(self, client: int, snapshots: list[tuple[str, int, int]]) -> None:
        """Answer a client that asked for contexts: name, layer and generation of each snapshot that
        the export can be compared with."""

    def answer_export(
        self,
        client: int,
        *,
        name: str,
        size_bytes: int,
        read_only: bool,
        channel: int | None = None,
    ) -> None:
        """Answer a client that asked for an export; with `channel` it is served from there."""

    def answer_error(self, client: int, kind: str, message: str) -> None:
        """Refuse a client. `kind`: unknown, refused or unavailable."""

    def next_event(self, timeout_ms: int) -> dict[str, Any] | None:
        """Return the next event, by its name in `event`, or None in time.

        Raises RuntimeError where the event loop has ended.
        """

    def snapshot(self) -> dict[str, Any]:
        """Return links, clients and images as they are now."""

    def stop(self) -> None:
        """End the event loop and all connections."""

@final
class Node:
    """A storage node's store, and the event loop that serves it to gateways.

    Opening it locks the folder, replays the log and raises the start counter, above `seen_counter`
    too. Nothing that it has of the images `distrusted` counts. Raises OSError where
    the folder cannot be used, RuntimeError where the store in it cannot (another cluster's or
    node's, open elsewhere, damaged). Its loop polls for `poll_us` at most before it sleeps.
    """

    def __new__(
        cls,
        data_dir: str,
        *,
        cluster: str,
        name: str,
        new_store_id: str,
        boot: str,
        log_bytes: int,
        seen_counter: int = 0,
        distrusted: list[str] = ...,
        poll_us: int = 0,
    ) -> Node: ...
    @property
    def start_counter(self) -> int: ...
    @property
    def store_id(self) -> str: ...
    @property
    def created(self) -> bool: ...
    def listen_tcp(self, address: str) -> None:
        """Let gateways in at `HOST:PORT`, numeric. Raises OSError."""

    def listen_unix(self, path: str) -> None:
        """Let gateways of this host in. Raises OSError."""

    def delete(self, image: str) -> None:
        """Delete an image for ever; its tombstone is durable on return."""

    def read_shard(self, image: str, layers: list[int], shard: int) -> bytes | None:
        """Return a shard's content, None where nothing was written.

        Raises ValueError where the node has no record of the image.
        """

    def usage(self, image: str) -> int:
        """Return the physical bytes that an image takes."""

    def inventory(self) -> dict[str, Any]:
        """Return `images`, each with image, epoch, holder, generation, digest and body of its
        record, and `merging`: of each such layer whether nothing is left of it here; `deleted`: ids
        of images that were deleted here; and `distrusted`: of those given at the start whose heal
        has not begun yet."""

    def folders(self) -> list[str]:
        """Return the images that have a folder on the disk, with a record or without one."""

    def status(self) -> dict[str, Any]:
        """Return capacity_bytes, free_bytes, images, connections, flush_number, log_bytes,
        dirty_shards, `no_space`: the last checkpoint found the disk full, and `counters`: what was
        done since the start, by name."""

    def failure(self) -> str | None:
        """Return why the node has ended by itself, None while it runs."""

    def stop(self) -> None:
        """Sync and end."""

@final
class Simulation:
    """A cluster in memory for tests: stores, replication and network on a clock that `run` moves.

    Only where the engine was built with the feature `simulation`, as `make setup` does; never in a
    release. Nodes and gateways are named by index; every method raises ValueError for one that does
    not exist. What policy orders is as in `Gateway`, with the gateway first.
    """

    def __new__(
        cls, seed: int, *, nodes: list[str], gateways: int, log_bytes: int, segment_bytes: int
    ) -> Simulation: ...
    @staticmethod
    def break_rules(names: list[str]) -> None:
        """Have this thread break these rules of the protocol, and keep all others."""

    @staticmethod
    def rules() -> list[str]:
        """Return the names of all rules that can be broken (`engine/core/src/rules.rs`)."""

    @property
    def now_ns(self) -> int: ...
    @property
    def trace(self) -> int:
        """A digest of all that was delivered so far."""

    def tell_all(self) -> None:
        """Keep what is delivered, in words, from now on."""

    def take_told(self) -> list[tuple[int, str]]:
        """Return when what was delivered, since the last time."""

    def run(self, until_ns: int) -> tuple[Any, ...] | None:
        """Let time pass until something happens, at most until then.

        ("event", gateway, event), ("answer", gateway, client, cookie, how, stamps or None),
        ("node_ended", node, whether it may have lost what was not synced, why).
        """

    def start_node(
        self, node: int, seen_counter: int = 0, distrusted: list[str] = ...
    ) -> tuple[str, int]:
        """Start a process as `Node` is made; return store and start counter.

        Raises RuntimeError.
        """

    def stop_node(self, node: int, power: bool) -> None:
        """Kill it; with `power` all goes that was not synced."""

    def pause_node(self, node: int) -> None: ...
    def continue_node(self, node: int) -> None: ...
    def delete_image(self, node: int, image: str) -> None:
        """Have a node delete an image for ever."""

    def set_disk_speed(self, node: int, min_ns: int, max_ns: int) -> None:
        """Set how long a sync takes."""

    def fail_sync(self, node: int, after: int) -> None:
        """Have the sync after so many more ones fail."""

    def set_free_bytes(self, node: int, free_bytes: int | None) -> None:
        """Leave so much on its disk."""

    def crash_after(self, node: int, steps: int, power: bool) -> None:
        """End it in the midst of what it does, after so many steps of its disk."""

    def snapshot_disk(self, node: int) -> None:
        """Put the state of its disk aside."""

    def restore_disk(self, node: int) -> bool:
        """Put that state back, while the node is off; False where there is none."""

    def corrupt(self, node: int, file: int, place: int) -> tuple[str, int] | None:
        """Invert a byte of a shard file; return where, None where there is no such byte."""

    def disk_paths(self, node: int) -> list[str]: ...
    def start_gateway(self, gateway: int) -> None: ...
    def stop_gateway(self, gateway: int, power: bool) -> None: ...
    def pause_gateway(self, gateway: int) -> None: ...
    def continue_gateway(self, gateway: int) -> None: ...
    def link(self, gateway: int, node: int) -> None:
        """Keep a connection to a node."""

    def reset(self, gateway: int, node: int) -> None:
        """Break the connection, if there is one."""

    def set_path(self, gateway: int, node: int, to_node: bool, passable: bool) -> None:
        """Open or block one way between the two."""

    def set_latency(self, gateway: int, node: int, min_ns: int, max_ns: int) -> None: ...
    def set_peer_path(self, asking: int, asked: int, passable: bool) -> None:
        """Open or block the way from one node to another."""

    def set_peer_latency(self, asking: int, asked: int, min_ns: int, max_ns: int) -> None: ...
    def reset_peers(self, asking: int, asked: int) -> None:
        """Break the connections on which one node asks another."""

    def pulls(self, node: int) -> int:
        """Return how many pulls are under way at a node."""

    def open(
        self,
        gateway: int,
        channel: int,
        *,
        image: str,
        size_bytes: int,
        shard_bytes: int,
        placement_key: str,
        layers: list[int],
        snapshots: list[tuple[int, int]],
        merging: list[int],
        epoch: int,
        holder: str,
        generation: int,
        digest: bytes,
        body: bytes,
        nodes: list[str],
        sets: list[list[int]],
        in_sync: list[list[int]],
        local: int | None = None,
        levelling: tuple[int, int, int] | None = None,
    ) -> None: ...
    def open_reader(
        self,
        gateway: int,
        channel: int,
        *,
        image: str,
        size_bytes: int,
        shard_bytes: int,
        placement_key: str,
        snapshot: tuple[int, int],
        nodes: list[str],
        sets: list[list[int]],
        in_sync: list[list[int]],
        local: int | None = None,
    ) -> None: ...
    def peek(self, gateway: int, channel: int, node: int) -> None: ...
    def admit(
        self, gateway: int, channel: int, nodes: list[tuple[int, int]], *, resume: bool
    ) -> None: ...
    def reconfigure(
        self,
        gateway: int,
        channel: int,
        *,
        generation: int,
        digest: bytes,
        body: bytes,
        in_sync: list[list[int]],
        layers: list[int],
        snapshots: list[tuple[int, int]],
        merging: list[int],
    ) -> None: ...
    def freeze(self, gateway: int, channel: int, attempt: int) -> None: ...
    def thaw(self, gateway: int, channel: int, attempt: int) -> None: ...
    def ask_emptied(self, gateway: int, channel: int) -> None: ...
    def refuse_writes(self, gateway: int, channel: int, sets: list[int]) -> None: ...
    def set_lease_deadline(self, gateway: int, channel: int, deadline_ns: int) -> None: ...
    def heal(
        self,
        gateway: int,
        channel: int,
        *,
        node: int,
        serial: int,
        attempt: int,
        sets: list[tuple[int, int]],
        bytes_per_second: int,
        shards_at_once: int,
        share_percent: int,
    ) -> None: ...
    def writes_lost(self, gateway: int, channel: int, sets: list[int]) -> None: ...
    def end_heal(self, gateway: int, channel: int, attempt: int) -> None: ...
    def resize(self, gateway: int, channel: int, size_bytes: int, body: bytes) -> None: ...
    def scrub(
        self,
        gateway: int,
        channel: int,
        *,
        attempt: int,
        from_shard: int,
        end_shard: int | None,
        bytes_per_second: int,
        share_percent: int,
    ) -> None: ...
    def end_scrub(self, gateway: int, channel: int, attempt: int) -> None: ...
    def scrub_state(self, gateway: int, channel: int) -> dict[str, Any] | None:
        """Return how far the scrub of an image is, None where there is none."""

    def close(self, gateway: int, channel: int) -> None: ...
    def kill(self, gateway: int, channel: int) -> None: ...
    def forget(self, gateway: int, channel: int) -> None: ...
    def read(
        self, gateway: int, channel: int, client: int, cookie: int, first: int, sectors: int
    ) -> bool:
        """Ask as a guest; False where the gateway has no image of this channel. So do the next."""

    def write(
        self,
        gateway: int,
        channel: int,
        client: int,
        cookie: int,
        first: int,
        sectors: int,
        stamp: int,
        durable: bool,
    ) -> bool: ...
    def zero(
        self,
        gateway: int,
        channel: int,
        client: int,
        cookie: int,
        first: int,
        sectors: int,
        keep_allocated: bool,
        durable: bool,
    ) -> bool: ...
    def flush(self, gateway: int, channel: int, client: int, cookie: int) -> bool: ...
    def node_record(self, node: int, image: str) -> tuple[int, str, int, bytes] | None:
        """Return epoch, holder, generation and digest of the record on a running node."""

    def node_layers(self, node: int, image: str) -> list[int] | None:
        """Return the layers that this record names, top first."""

    def node_layers_held(self, node: int, image: str) -> list[int]:
        """Return the layers of which a running node has anything: in log, dirty map or files."""

    def inventory(self, node: int) -> dict[str, Any]:
        """Return what a running node holds, as `Node.inventory`."""

    def distrusted(self, node: int) -> list[str]:
        """Return those of which nothing counts that it has, since its store was set back."""

    def dirty(self, node: int, image: str) -> list[int]:
        """Return the dirty shards of a running node."""

    def has_image(self, node: int, image: str) -> bool: ...
    def remembers(self, node: int, image: str) -> bool:
        """Whether it was level with its peers once and has kept its memory since."""

    def shard_digests(
        self, node: int, image: str, layers: list[int], shard: int
    ) -> list[int | None] | None:
        """Return a digest of each block on a running node, None where it is damaged."""

    def take_applied(self, stamp: int) -> list[tuple[int, int]]:
        """Return, and forget, who has applied a write: shard and mask of nodes."""

    def queues(self, gateway: int, channel: int) -> tuple[int, int, int]:
        """Return requests, parts and unanswered sequences of an open image."""

    def node_queues(self, node: int) -> tuple[int, int]:
        """Return answers that wait for a sync, requests that wait for room in the log."""

    def replica_states(self, gateway: int, channel: int) -> list[tuple[str, str]]: ...
