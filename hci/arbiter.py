"""The thin arbiter's daemon: opens its record, votes, registers in etcd, forgets deleted images.

It votes whether etcd answers or not: what etcd holds arrives with each request. etcd is needed to
be found (its address and id stand there), and to hear of deleted images.
"""

import os
import threading
import time

import structlog

from arbiter import arbiter_pb2 as pb
from arbiter.errors import ArbiterError
from arbiter.record import Record
from arbiter.server import serve as serve_votes
from arbiter.vote import Vote
from arbiter.voting import Voting
from engine import VERSION
from etcd import keys
from etcd.client import EtcdClient
from etcd.errors import EtcdError
from etcd.interface import Notice, Reread
from etcd.lease import Session
from etcd.records import ArbiterRecord, ClusterRecord, awaited_arbiter
from hci import daemon, metrics, notify
from hci.config import ArbiterConfig, Config
from hci.errors import DaemonError
from hci.history import CHECK_S, tombstones
from shard.ids import ImageId
from vmstore.catalog import Catalog
from vmstore.errors import (
    ArbiterRetired,
    ArbiterRolledBack,
    ForeignArbiter,
    OtherCluster,
    RecordChanged,
    RecordsLost,
)
from vmstore.history import decoded, judge_votes
from vmstore.stored import Stored

log = structlog.get_logger()

RETRY_S = 1.0
STOP_GRACE_S = 1.0


def serve(config: Config, name: str) -> None:
    """Be the arbiter `name` until told to stop. Raises DaemonError, ConfigError, ArbiterError."""
    daemon.log_to_stderr()
    ending = daemon.Ending()
    ArbiterDaemon(config, config.arbiter(name), ending).run()
    ending.raise_failure()


class ArbiterDaemon:
    """One thin arbiter."""

    def __init__(self, config: Config, own: ArbiterConfig, ending: daemon.Ending) -> None:
        self.config = config
        self.own = own
        self.ending = ending
        self.registered = False
        self.trouble = ""
        try:
            self.record = Record(own.data_dir, name=own.name, cluster=config.cluster.id)
        except OSError as error:
            raise DaemonError(f"arbiter {own.name} cannot use {own.data_dir}: {error}") from error
        self.voting = Voting(self.record)
        self._damaged = self.record.damaged()
        self.etcd = EtcdClient([str(endpoint) for endpoint in config.cluster.etcd])
        self.catalog = Catalog(self.etcd)
        self._session: Session | None = None
        self._session_lost = threading.Event()
        self._watching = False
        self._history_due_s = 0.0
        self._history_lost = False
        self._unconfirmed: set[ImageId] = set()

    def run(self) -> None:
        """Vote until it is time to end."""
        own = self.own
        identity = self.record.identity
        try:
            server = serve_votes(self.voting, self.status, str(own.listen))
        except ArbiterError:
            self.etcd.close()
            self.record.close()
            raise
        try:
            log.info("arbiter_started", arbiter=own.name, id=identity.id,
                     instance=identity.start_counter, listen=str(own.listen),
                     version=VERSION)  # fmt: skip
            for problem in self._damaged:
                log.error("votes_damaged", arbiter=own.name, why=problem)
            with metrics.served(f"arbiter {own.name}", own.metrics, self._samples):
                self._look_after()
                notify.attend(self.ending, self._look_after)
        finally:
            server.stop(grace=STOP_GRACE_S).wait()
            if self._session is not None:
                self._session.close()
            self.etcd.close()
            self.record.close()
            log.info("arbiter_stopped", arbiter=own.name)

    def status(self) -> pb.ArbiterStatus:
        """Return how the arbiter is. For any thread."""
        identity = self.record.identity
        return pb.ArbiterStatus(
            name=self.own.name,
            state=self._state(),
            trouble=self.record.failure
            or self.trouble
            or self._unheard()
            or "; ".join(self._damaged[:1]),
            version=VERSION,
            cluster_id=identity.cluster,
            arbiter_id=identity.id,
            start_counter=identity.start_counter,
            images=len(self.record.images()),
            data_dir=str(self.own.data_dir),
            history_lost=self._history_lost,
            counters={**self.voting.counters(), "pid": os.getpid()},
        )

    def _samples(self) -> metrics.Samples:
        """Return the arbiter's metrics."""
        gauge, counter = metrics.gauge, metrics.counter
        works = int(not self.record.failure)
        yield gauge("hci_arbiter_up", "1: it votes; 0: its disk has failed.", works)
        yield gauge("hci_arbiter_registered", "1: known in etcd as there.",
                    int(self._known()))  # fmt: skip
        yield gauge("hci_arbiter_history_lost", "1: etcd is behind what was voted on.",
                    int(bool(self._history_lost)))  # fmt: skip
        yield gauge("hci_arbiter_images", "Images whose votes it keeps.", len(self.record.images()))
        yield gauge("hci_arbiter_damaged_images", "Images whose votes were damaged when it "
                    "started.", len(self._damaged))  # fmt: skip
        votes = {(verdict,): count for verdict, count in self.voting.counters().items()}
        yield counter("hci_arbiter_votes_total", "Requests of holders, by how they ended.",
                      votes, ["verdict"])  # fmt: skip

    def _state(self) -> "pb.ArbiterStatus.State.ValueType":
        if self.record.failure:
            return pb.ArbiterStatus.STATE_FAILED
        if self.ending.due:
            return pb.ArbiterStatus.STATE_STOPPING
        if self._known():
            return pb.ArbiterStatus.STATE_SERVING
        return pb.ArbiterStatus.STATE_STARTING

    def _known(self) -> bool:
        """Whether etcd says that the arbiter is there, as far as that can be known."""
        return self.registered and not self._unheard()

    def _unheard(self) -> str:
        """Say so where etcd may have forgotten the arbiter since it answered last."""
        return daemon.unheard(self._session) if self.registered else ""

    def _look_after(self) -> None:
        if self.record.failure:
            self.ending.fail(f"arbiter {self.own.name}: {self.record.failure}")
            return
        if self._session_lost.is_set():
            self._session_lost.clear()
            self.registered = False
        if self.registered:
            self._recheck_history()
            self._confirm_dropped()
        if not self.registered:
            self._register()

    def _check_history(self) -> None:
        """Raise RecordsLost where etcd is behind what was voted on, or marked as lost."""
        voted = [
            (image, max(vote.epoch for vote in votes), max(_confirmed(vote) for vote in votes))
            for image, votes in self.voting.known()
        ]
        now = {item.key: item.value for item in self.etcd.get_prefix(keys.PREFIX).items}
        self._history_due_s = time.monotonic() + CHECK_S
        if keys.LOST not in now:
            problems = list(judge_votes(voted, now))
            self._history_lost = bool(problems)
            if not problems:
                return
            cluster = decoded(ClusterRecord, keys.CLUSTER, now)
            found = None
            if cluster is not None:
                found = Stored(keys.CLUSTER, cluster, now[keys.CLUSTER], 0)
            more = f"; and {len(problems) - 1} more" if len(problems) > 1 else ""
            self.catalog.mark_lost(f"arbiter {self.own.name}", problems[0] + more, found)
        self._history_lost = True
        self.catalog.check_history()

    def _recheck_history(self) -> None:
        """Look now and then whether etcd may still be believed; else be registered no longer."""
        if time.monotonic() < self._history_due_s:
            return
        try:
            self._check_history()
        except RecordsLost:
            self.registered = False
            if self._session is not None:
                self._session.close()
                self._session = None
        except EtcdError:
            return

    def _on_mark(self, _notice: Notice) -> None:
        """Somebody found that etcd lost history, or it was recovered."""
        self._history_due_s = 0.0

    def _register(self) -> None:
        """Say in etcd who and where we are, and that we run; try again where it is away."""
        identity = self.record.identity
        record = ArbiterRecord(
            name=self.own.name,
            id=identity.id,
            address=str(self.own.listen),
            host=self.own.host,
            start_counter=identity.start_counter,
        )
        try:
            # First: to who knows one cluster, the records of any other are lost history, and one
            # that was replaced or set back has votes on images that were deleted since.
            self.catalog.check_cluster(self.config.cluster.id)
            self.catalog.check_arbiter(record)
            self._check_history()
            self.catalog.init_cluster(self.config.cluster.id)
            session = Session(self.etcd, on_lost=self._session_lost.set)
            self.catalog.announce_arbiter(record, session.lease)
            self._session = session.start()
            if not self._watching:
                self.etcd.watch(keys.ARBITERS, self._on_arbiters)
                self.etcd.watch(keys.TOMBSTONES, self._on_tombstones)
                self.etcd.watch(keys.LOST, self._on_mark)
                self._watching = True
        except (OtherCluster, ForeignArbiter, ArbiterRolledBack, ArbiterRetired) as error:
            self.ending.fail(str(error))
        except (EtcdError, RecordChanged, RecordsLost) as error:
            if not self.trouble:
                log.warning("registration_waits", arbiter=self.own.name, why=str(error))
            self.trouble = str(error)
            self.ending.wait(RETRY_S)
        else:
            self.registered, self.trouble = True, ""
            log.info("arbiter_registered", arbiter=self.own.name)

    def _on_arbiters(self, notice: Notice) -> None:
        """An arbiter that was replaced ends: nobody asks it any more, and nobody should."""
        for item in notice.items if isinstance(notice, Reread) else notice.changes:
            if item.key != keys.arbiter(self.own.name) or item.value is None:
                continue
            try:
                record = ArbiterRecord.decode(item.key, item.value)
            except EtcdError as error:
                log.error("record_unreadable", arbiter=self.own.name, why=str(error))
                continue
            if record.retired:
                self.ending.fail(str(ArbiterRetired(self.own.name)))

    def _on_tombstones(self, notice: Notice) -> None:
        """Images were deleted somewhere: their votes go here too."""
        found = notice.items if isinstance(notice, Reread) else notice.changes
        deleted = [item.key for item in found if item.value is not None]
        for image in tombstones(deleted):
            if self._drop(image):
                self._unconfirmed.add(image)

    def _drop(self, image: ImageId) -> bool:
        """Drop the votes of a deleted image, if there are any; return whether none are left."""
        try:
            known = self.voting.drop(image)
        except ArbiterError as error:
            log.error("drop_failed", arbiter=self.own.name, image=image, why=str(error))
            return False
        if known:
            log.info("image_dropped", arbiter=self.own.name, image=image)
        return True

    def _confirm_dropped(self) -> None:
        """Say in etcd which deleted images are not voted on here any more."""
        for image in sorted(self._unconfirmed):
            try:
                self.catalog.confirm_deleted(image, awaited_arbiter(self.own.name))
            except (EtcdError, RecordChanged):
                return  # Tried again a moment later.
            self._unconfirmed.discard(image)


def _confirmed(vote: Vote) -> int:
    return vote.confirmed.generation if vote.confirmed is not None else 0
