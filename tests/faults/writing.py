"""A writer that keeps at it in a thread of its own while something is done to the cluster."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from tests.faults.flushed_writer import FlushedWriter
from tests.faults.nbd_session import NbdSession

STOP_TIMEOUT_S = 90.0
PROGRESS_TIMEOUT_S = 60.0


@contextlib.contextmanager
def writing(session: NbdSession, seed: int) -> Iterator[FlushedWriter]:
    """Writes from here to the end of the block; then nothing may have failed or be missing."""
    writer = FlushedWriter(session.blocks, seed)
    enough = threading.Event()
    thread = threading.Thread(target=writer.run, args=(session, enough.is_set), name="writer")
    thread.start()
    try:
        yield writer
    finally:
        enough.set()
        thread.join(STOP_TIMEOUT_S)
    assert not thread.is_alive(), "writes are not answered"
    assert writer.error is None, writer.error


def await_progress(writer: FlushedWriter) -> float:
    """Returns when flushes sent from now on are answered again, and how long that took."""
    began_s = time.monotonic()
    wanted = writer.flushes + 2
    while writer.flushes < wanted:
        assert writer.error is None, writer.error
        assert time.monotonic() - began_s < PROGRESS_TIMEOUT_S, "no flush is answered"
        time.sleep(0.02)
    return time.monotonic() - began_s
