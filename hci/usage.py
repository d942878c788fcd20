"""`FolderUsage`: what a folder's files take on the disk, counted beside what else goes on."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

SECTOR_BYTES = 512
"""Unit of `st_blocks`, whatever the file system's own (stat(2))."""

PAUSE_S = 2.0
PAUSE_PER_COUNT = 50
"""Between two counts: so long at least, and so many times as long as the last one took. A store of
a million files takes seconds to count."""

WAIT_S = 0.5
"""How long who asks waits for a count that is under way; then the one before it must do."""


class FolderUsage:
    """Counts the bytes that a folder's files take. For any thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._idle = threading.Event()
        self._idle.set()
        self._next_s = 0.0
        self._bytes: int | None = None

    def count(self) -> int | None:
        """Return what was counted last, None where nothing was yet; begin anew where it is old."""
        with self._lock:
            if self._idle.is_set() and time.monotonic() >= self._next_s:
                self._idle.clear()
                threading.Thread(target=self._count, name="usage", daemon=True).start()
        self._idle.wait(WAIT_S)
        return self._bytes

    def _count(self) -> None:
        began_s = time.monotonic()
        try:
            self._bytes = sum(_allocated(self._folder))
        finally:
            ended_s = time.monotonic()
            self._next_s = ended_s + max(PAUSE_S, PAUSE_PER_COUNT * (ended_s - began_s))
            self._idle.set()


def _allocated(folder: Path) -> Iterator[int]:
    """Bytes of each file; one that goes away meanwhile takes none."""
    folders = [str(folder)]
    while folders:
        try:
            entries = list(os.scandir(folders.pop()))
        except OSError:
            continue
        for entry in entries:
            try:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                else:
                    yield entry.stat(follow_symlinks=False).st_blocks * SECTOR_BYTES
            except OSError:
                continue
