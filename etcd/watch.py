"""A watch that rides out what happens to etcd.

    state        event                                  next
    reading      all keys read: deliver Reread          streaming from the revision after
    streaming    changes: deliver Changes               streaming from the revision after
    streaming    stream lost                            streaming again, from the same revision
    streaming    history compacted, or gone back        reading
    any          cancelled                              ended

One thread per watch. A notice that raises is a programmer's error: it ends the watch and reaches
`threading.excepthook`.
"""

import threading
from collections.abc import Callable
from typing import Protocol

from etcd.errors import ClientClosed, EtcdRefused, EtcdUnavailable
from etcd.interface import Changes, Listing, OnNotice, Reread
from etcd.rpc import CallFailed, Compacted, WatchStream

RETRY_FIRST_S = 0.1
RETRY_LAST_S = 2.0
"""Pauses between attempts double from the first to the last."""


class Source(Protocol):
    """What a watch needs of the client."""

    def get_prefix(self, prefix: str) -> Listing:
        """Return all keys now."""

    def open_stream(self, prefix: str, from_revision: int) -> WatchStream:
        """Open a stream on the endpoint in use."""

    def stream_failed(self, stream: WatchStream) -> None:
        """Learn that a stream failed, so that the next one goes to another endpoint."""


class EtcdWatch:
    """A running watch; see `etcd.interface.Etcd.watch`."""

    def __init__(
        self,
        source: Source,
        prefix: str,
        on_notice: OnNotice,
        from_revision: int | None,
        on_end: Callable[["EtcdWatch"], None],
    ) -> None:
        self._source = source
        self._prefix = prefix
        self._on_notice = on_notice
        self._next_revision = from_revision
        self._on_end = on_end
        self._cancelled = threading.Event()
        self._lock = threading.Lock()
        self._stream: WatchStream | None = None
        self._thread = threading.Thread(target=self._run, name=f"etcd-watch {prefix}", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def cancel(self) -> None:
        """End the watch and wait until no notice is being delivered."""
        self._cancelled.set()
        with self._lock:
            if self._stream is not None:
                self._stream.cancel()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        pause_s = RETRY_FIRST_S
        try:
            while not self._cancelled.is_set():
                try:
                    if self._follow():
                        pause_s = RETRY_FIRST_S
                except (EtcdUnavailable, EtcdRefused):
                    pass  # Other calls report it; the watch goes on when it ends.
                if self._cancelled.wait(pause_s):
                    return
                pause_s = min(2 * pause_s, RETRY_LAST_S)
        except ClientClosed:
            return
        finally:
            self._on_end(self)

    def _follow(self) -> bool:
        """Follow one stream to its end and return whether it had begun."""
        if self._next_revision is None:
            listing = self._source.get_prefix(self._prefix)
            self._next_revision = listing.revision + 1
            self._deliver(Reread(listing.revision, listing.items))
        stream = self._open(self._next_revision)
        if stream is None:
            return False
        begun = False
        try:
            for answer in stream.answers():
                begun = True
                if answer.created and answer.revision + 1 < self._next_revision:
                    # The member is behind, or etcd was restored: only reading all tells which.
                    self._next_revision = None
                    return begun
                if answer.changes:
                    # The answer's own revision may be ahead of changes that are still to come.
                    revision = answer.changes[-1].mod_revision
                    self._next_revision = revision + 1
                    self._deliver(Changes(revision, answer.changes))
                elif not answer.created:
                    self._next_revision = max(self._next_revision, answer.revision + 1)
                if self._cancelled.is_set():
                    return begun
        except Compacted:
            self._next_revision = None
        except CallFailed:
            if not self._cancelled.is_set():
                self._source.stream_failed(stream)
        finally:
            stream.cancel()
            with self._lock:
                self._stream = None
        return begun

    def _open(self, from_revision: int) -> WatchStream | None:
        stream = self._source.open_stream(self._prefix, from_revision)
        with self._lock:
            self._stream = stream
        if self._cancelled.is_set():
            stream.cancel()
            return None
        return stream

    def _deliver(self, notice: Changes | Reread) -> None:
        if not self._cancelled.is_set():
            self._on_notice(notice)
