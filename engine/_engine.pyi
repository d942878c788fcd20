"""Types of the Rust module. `make check` compares this file with the module, both ways."""

from typing import Any, Final, final

__all__ = ["VERSION", "Gateway", "Node"]

VERSION: Final[str]
"""Version of the engine, the same as the distribution's."""

@final
class Gateway:
    """The event loop of a gateway. Methods return at once; `next_event` tells what came of them.

    Nodes of an image are named by their index in the `nodes` that it was opened with. Every method
    raises RuntimeError once the gateway is stopped, and ValueError for what makes no sense.
    """

    def __new__(cls) -> Gateway: ...
    def listen(self, fd: int) -> None:
        """Take over a listening socket, by descriptor."""

    def stop_listening(self) -> None:
        """Let connections that arrive from now on wait in the socket."""

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
        epoch: int,
        holder: str,
        generation: int,
        digest: bytes,
        body: bytes,
        nodes: list[str],
        sets: list[list[int]],
        in_sync: list[list[int]],
        local: int | None = None,
    ) -> None:
        """Begin with an image: its nodes are asked for their records (`peeked`)."""

    def peek(self, channel: int, node: int) -> None:
        """Ask a node that waits to be admitted for its record again."""

    def admit(self, channel: int, nodes: list[tuple[int, int]], *, resume: bool) -> None:
        """Let nodes in: at once (`resume`), or after they are level (`admitted`).

        Each node with the `serial` of its last `peeked`; one that was asked again since stays out.
        """

    def reconfigure(
        self, channel: int, *, generation: int, digest: bytes, body: bytes, in_sync: list[list[int]]
    ) -> None:
        """Go by a new record; `stored` tells that the nodes in sync hold it."""

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
        While clients ask for something it works `share_percent` of the time.
        """

    def end_heal(self, channel: int, attempt: int) -> None:
        """Give that heal up; the node stays stale."""

    def set_lease_deadline(self, channel: int, deadline_ns: int) -> None:
        """Past this time of CLOCK_BOOTTIME reads need the nodes' word for our epoch."""

    def resize(self, channel: int, size_bytes: int, body: bytes) -> None:
        """Show the new size to clients that connect from now on; the nodes keep the record."""

    def zero(self, channel: int, offset: int, length: int) -> None:
        """Make a range read as zeroes (`zeroed`)."""

    def disconnect(self, channel: int) -> None:
        """End the connections of an image's clients, without answers."""

    def close(self, channel: int) -> None:
        """Flush, clear, let go (`closed`)."""

    def kill(self, channel: int) -> None:
        """End an image at once; its requests fail."""

    def forget(self, channel: int) -> None:
        """Drop an image that is closed or killed."""

    def answer_names(self, client: int, names: list[str]) -> None:
        """Answer a client that asked for the list of exports."""

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

    Opening it locks the folder, replays the log and raises the start counter. Raises OSError where
    the folder cannot be used, RuntimeError where the store in it cannot (another cluster's or
    node's, open elsewhere, damaged).
    """

    def __new__(
        cls, data_dir: str, *, cluster: str, name: str, new_store_id: str, boot: str, log_bytes: int
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

    def status(self) -> dict[str, Any]:
        """Return capacity_bytes, free_bytes, images, connections, flush_number, log_bytes,
        dirty_shards, `no_space`: the last checkpoint found the disk full, and `counters`: what was
        done since the start, by name."""

    def failure(self) -> str | None:
        """Return why the node has ended by itself, None while it runs."""

    def stop(self) -> None:
        """Sync and end."""
