"""The disk of a simulated arbiter: a directory in memory that knows what of it was synced.

The arbiter's own record works on it as on any directory. A power cut leaves what was durable, and
of what was not perhaps the names, perhaps nothing.
"""

from __future__ import annotations

import os
import random
import shutil
import stat
import tempfile
import weakref
from pathlib import Path

Tree = dict[str, bytes]
"""Contents of files by their path in the directory."""

_MEMORY = Path("/dev/shm")


class Crash(BaseException):
    """The process ends in the midst of what it does."""


class ArbiterDisk:
    """See the module. `crash_in` counts the syncs until the process ends in one."""

    def __init__(self) -> None:
        parent = _MEMORY if _MEMORY.is_dir() else None
        self.root = Path(tempfile.mkdtemp(prefix="hci-sim-", dir=parent))
        self._cleanup = weakref.finalize(self, shutil.rmtree, self.root, ignore_errors=True)
        self.crash_in: int | None = None
        self._durable: Tree = {}
        self._synced: dict[int, bytes] = {}
        """What is durable of a file, by its number in the directory's file system."""

    def sync(self, descriptor: int) -> None:
        """Make a file or a directory durable, as fsync does. Raises Crash."""
        if self.crash_in is not None:
            self.crash_in -= 1
            if self.crash_in < 0:
                raise Crash
        found = os.fstat(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if stat.S_ISDIR(found.st_mode):
            kept = {n: c for n, c in self._durable.items() if (self.root / n).parent != path}
            self._durable = {**kept, **self._named(path)}
        else:
            self._synced[found.st_ino] = path.read_bytes()

    def _named(self, path: Path) -> Tree:
        """Return the files of a directory, each with what is durable of it."""
        files = sorted(file for file in path.iterdir() if file.is_file() and file.name != "lock")
        return {
            str(file.relative_to(self.root)): self._synced.get(file.stat().st_ino, b"")
            for file in files
        }

    def power_cut(self, chance: random.Random) -> None:
        """Lose what was not synced; names that were not may have come to the disk."""
        tree = self._durable
        if chance.random() < 0.5:
            directories = [path for path in (self.root, self.root / "votes") if path.is_dir()]
            tree = {**tree, **{n: c for path in directories for n, c in self._named(path).items()}}
        self.put_back(tree)

    def tree(self) -> Tree:
        """Return all that is on it now."""
        files = [path for path in self.root.rglob("*") if path.is_file() and path.name != "lock"]
        return {str(path.relative_to(self.root)): path.read_bytes() for path in sorted(files)}

    def put_back(self, tree: Tree) -> None:
        """Have this on it, durably, and nothing else. Nobody may be using it."""
        shutil.rmtree(self.root)
        (self.root / "votes").mkdir(parents=True)
        self._synced = {}
        for name, content in tree.items():
            path = self.root / name
            path.write_bytes(content)
            self._synced[path.stat().st_ino] = content
        self._durable = dict(tree)
        self.crash_in = None

    def remove(self) -> None:
        """Give its memory back. Nobody uses it any more."""
        self._cleanup()

    def plain(self, text: str) -> str:
        """Return a text without the directory's name, which is another in each run."""
        return text.replace(str(self.root), "DATA_DIR")
