"""`Ledger`: a member's own durable copy of the cluster's records, as etcd said them last.

etcd is where records are; this is what remains of them on each node when etcd is lost, and what
shows that etcd was put back to an older copy. It holds every key but those that end with an etcd
lease. Whoever keeps it takes in nothing from an etcd that has lost history.

SQLite keeps it whole through crashes. It is not synced at each change: after a power cut it may be
a little behind, which costs nothing but that etcd's own loss of that little is not seen by it.
"""

import sqlite3
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

import structlog

from etcd import keys
from etcd.interface import Changed, KeyValue
from etcd.records import ClusterRecord, NodeRecord
from shard.errors import HciError
from shard.ids import ImageId
from vmstore.history import Known, decoded

log = structlog.get_logger()

VERSION = 1

_READ = "SELECT key, value, revision FROM records"
_READ_FORMER = "SELECT key, value, revision FROM former"
_PUT = "INSERT OR REPLACE INTO records VALUES (?, ?, ?)"
_PUT_FORMER = "INSERT OR REPLACE INTO former VALUES (?, ?, ?)"
_TABLES = """
    CREATE TABLE IF NOT EXISTS records (key TEXT PRIMARY KEY, value BLOB, revision INTEGER);
    CREATE TABLE IF NOT EXISTS former (key TEXT PRIMARY KEY, value BLOB, revision INTEGER);
    CREATE TABLE IF NOT EXISTS contested (image TEXT PRIMARY KEY, why TEXT);
"""


class LedgerFailed(HciError):
    """The copy of the cluster's records could not be read or written."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path}, the copy of the cluster's records, cannot be used: {why}")


class Ledger:
    """The copy in one file. For any thread."""

    def __init__(self, path: Path) -> None:
        """Open it, or make it. One that is damaged is put aside. Raises LedgerFailed."""
        self._path = path
        self._lock = threading.Lock()
        self._records: dict[str, KeyValue] = {}
        self._former: dict[str, KeyValue] = {}
        self._contested: dict[ImageId, str] = {}
        self.failure = ""
        """Why it is not kept up to date on the disk; empty while it is."""
        try:
            self._open()
        except sqlite3.DatabaseError as error:
            log.error("ledger_damaged", path=str(path), why=str(error))
            try:
                path.replace(path.with_name(path.name + ".damaged"))
                self._open()
            except (OSError, sqlite3.Error) as again:
                raise LedgerFailed(path, str(again)) from again

    def known(self) -> Known:
        """Return what it says, as of no member."""
        with self._lock:
            return Known(
                "",
                self.recoveries,
                records=dict(self._records),
                former=dict(self._former),
                contested=frozenset(self._contested),
            )

    @property
    def recoveries(self) -> int:
        """How many recoveries the etcd had seen that was believed last."""
        item = self._records.get(keys.CLUSTER)
        if item is None:
            return 0
        cluster = decoded(ClusterRecord, item.key, {item.key: item.value})
        return cluster.recoveries if cluster is not None else 0

    @property
    def contested(self) -> Mapping[ImageId, str]:
        """Images of which the store has another record than was recovered."""
        return dict(self._contested)

    def start_counter(self, node: str) -> int:
        """Return how often a node was started, as etcd said last; 0 where it said nothing."""
        item = self._records.get(keys.node(node))
        record = decoded(NodeRecord, item.key, {item.key: item.value}) if item else None
        return record.start_counter if record is not None else 0

    def records(self) -> dict[str, KeyValue]:
        """Return all that etcd said last."""
        with self._lock:
            return dict(self._records)

    def follow(self, changes: Iterable[Changed]) -> None:
        """Take in changes of an etcd that is believed."""
        kept = [change for change in changes if not change.key.startswith(keys.BOUND)]
        put = [
            KeyValue(change.key, change.value, change.mod_revision)
            for change in kept
            if change.value is not None
        ]
        gone = [change.key for change in kept if change.value is None]
        with self._lock:
            self._records.update({item.key: item for item in put})
            for key in gone:
                self._records.pop(key, None)
            self._write(put, gone)

    def take(self, items: Iterable[KeyValue], contested: Mapping[ImageId, str]) -> None:
        """Take in all that an etcd says which is believed.

        What is contested keeps the records of before, for a recovery to come.
        """
        found = {item.key: item for item in items if not item.key.startswith(keys.BOUND)}
        with self._lock:
            if contested and not self._contested:
                missing = {key: item for key, item in self._records.items() if key not in found}
                self._former.update(missing)
            elif not contested:
                self._former.clear()
            put = [item for item in found.values() if self._records.get(item.key) != item]
            gone = [key for key in self._records if key not in found]
            changed = dict(contested) != self._contested
            self._records, self._contested = found, dict(contested)
            if put or gone or changed:
                self._write(put, gone, all_else=changed)

    def forget(self) -> None:
        """Drop all of it: the disk that it is on was set back, and it is as old as that."""
        with self._lock:
            gone = list(self._records)
            self._records, self._former, self._contested = {}, {}, {}
            self._write((), gone, all_else=True)

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._database.close()

    def _open(self) -> None:
        self._database = sqlite3.connect(self._path, check_same_thread=False)
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = NORMAL")
        self._database.executescript(_TABLES)
        (version,) = self._database.execute("PRAGMA user_version").fetchone()
        if version not in (0, VERSION):
            raise LedgerFailed(self._path, f"its version is {version}, this program's {VERSION}")
        self._database.execute(f"PRAGMA user_version = {VERSION}")
        self._records = self._load(_READ)
        self._former = self._load(_READ_FORMER)
        rows = self._database.execute("SELECT image, why FROM contested").fetchall()
        self._contested = {ImageId(image): why for image, why in rows}

    def _load(self, read: str) -> dict[str, KeyValue]:
        rows = self._database.execute(read).fetchall()
        return {key: KeyValue(key, bytes(value), revision) for key, value, revision in rows}

    def _write(
        self, put: Iterable[KeyValue], gone: Iterable[str], *, all_else: bool = False
    ) -> None:
        """Write changes, or what there is in all where an earlier write failed."""
        try:
            with self._database as database:
                if self.failure:
                    database.execute("DELETE FROM records")
                    put, gone, all_else = self._records.values(), (), True
                database.executemany(_PUT, [_row(item) for item in put])
                database.executemany("DELETE FROM records WHERE key = ?", [(key,) for key in gone])
                if all_else:
                    database.execute("DELETE FROM former")
                    database.executemany(_PUT_FORMER, map(_row, self._former.values()))
                    database.execute("DELETE FROM contested")
                    database.executemany(
                        "INSERT INTO contested VALUES (?, ?)", list(self._contested.items())
                    )
        except sqlite3.Error as error:
            # The store works without it, and so do guests: it is tried again with the next change.
            if not self.failure:
                log.error("ledger_not_written", path=str(self._path), why=str(error))
            self.failure = str(LedgerFailed(self._path, str(error)))
        else:
            self.failure = ""


def _row(item: KeyValue) -> tuple[str, bytes, int]:
    return item.key, item.value, item.mod_revision
