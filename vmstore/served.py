"""`Served`: which client processes a gateway serves which image, and which it never serves again.

An NBD client that reconnects sends again what it got no answer to. Where another gateway had the
image for clients meanwhile, that would overwrite what they wrote: a client is let in again only as
long as none did. A lease for maintenance does not count, it changes nothing that clients wrote. A
client is told by its process, such as "1234:567890": its id and when it began, in the kernel's
ticks since boot. Nothing is known of a client over TCP.

    a process is   by                                                until
    served         admit: written down before the client is let in   it leaves in order, or ends
    barred         the image was another's after it was served      it ends

With the processes of an image goes the *memory* of what they were answered: which boot of its host
each node in sync had. Where all have another one, what was not flushed may be gone.

What is known stands in a file too, so that a gateway that was killed and replaced knows whom it
served. It is replaced whole, and needs no sync: it speaks of processes, none of which outlives what
a sync protects from.
"""

import json
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import structlog

from etcd.images import ImageRecord
from shard.errors import HciError
from shard.ids import ImageId
from vmstore.errors import ClientBarred
from vmstore.names import ImageName

log = structlog.get_logger()

VERSION = 1

PROCESSES_MAX = 16_384
"""Of images and the processes that they are served to; more are turned away."""

HOLDERS_MAX = 64
"""Former processes of the gateway that are known: one more for each restart."""


@dataclass(slots=True)
class _Image:
    """What is known of one image: the epoch and holder in which it was ours for clients last."""

    epoch: int
    holder: str
    served: set[str] = field(default_factory=set)
    barred: set[str] = field(default_factory=set)

    def only_ours_until(self, record: ImageRecord, ours: Collection[str]) -> bool:
        """Whether nobody else has had the image for clients, up to what its record says now.

        One epoch may be ours that was never written down: that of a process which was killed
        between taking the lease and writing. More are taken for another's.
        """
        last = record.last_use
        if last is None:
            return False
        if last.epoch == self.epoch:
            return last.holder == self.holder
        return last.epoch == self.epoch + 1 and last.holder in ours


class ServedFile:
    """Where processes of a gateway leave word for the next one."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    def read(self) -> str | None:
        """Return what was written last; None: nothing was. Raises OSError."""
        try:
            return self._path.read_text()
        except FileNotFoundError:
            return None

    def write(self, text: str) -> None:
        """Put this in place of what there was, whole. Raises OSError."""
        part = self._path.with_name(f".{self._path.name}.part")
        part.write_text(text)
        part.replace(self._path)


@dataclass(frozen=True, slots=True)
class Fenced:
    """What other gateways took from this one since its process began."""

    images: int = 0
    """Times that an image was found to be another's."""
    barred: int = 0
    """Processes of clients that had one then."""
    refused: int = 0
    """Times that such a process was not let in again."""


class Served:
    """Knows the client processes of one gateway. For any thread; `save` and `admit` write a file.

    `holder` is the id of this process of the gateway. `file` is where its predecessors wrote what
    they knew in the same boot of the host, named by `boot`; None keeps nothing.
    """

    def __init__(
        self,
        holder: str,
        *,
        file: ServedFile | None = None,
        boot: str = "",
        lives: Callable[[str], bool] | None = None,
    ) -> None:
        self._file = file
        self._boot = boot
        self._lives = lives or process_lives
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._fenced = Fenced()
        self._holders: list[str] = []
        self._images: dict[ImageId, _Image] = {}
        self._memory: dict[ImageId, dict[str, str]] = {}
        if file is not None:
            self._read(file)
        self._holders = [*self._holders, holder][-HOLDERS_MAX:]
        if self._images:
            self.save()

    def check(self, name: ImageName, peer: str | None, record: ImageRecord) -> None:
        """Raise ClientBarred for a process that must not be let in, by the record as it is now.

        Asked before an image is opened for a client, so that a barred one has nothing opened.
        """
        with self._lock:
            known = self._images.get(record.id)
            if known is None or peer is None:
                return
            lost = peer in known.served and not known.only_ours_until(record, self._holders)
            if lost or peer in known.barred:
                self._fenced = replace(self._fenced, refused=self._fenced.refused + 1)
                raise ClientBarred(str(name))

    def taken(self, before: ImageRecord, now: ImageRecord) -> None:
        """Note that the lease was taken or claimed: `before` is the record that it was taken by."""
        with self._lock:
            if before.clean:
                self._memory.pop(now.id, None)
            known = self._images.get(now.id)
            if known is None:
                return
            if not known.only_ours_until(before, self._holders):
                self._bar(now.id, known)
            last = now.last_use
            if last is not None:
                known.epoch, known.holder = last.epoch, last.holder
        self.save()

    def is_served(self, peer: str | None, record: ImageRecord) -> bool:
        """Whether nothing needs to be written down before this process is let in."""
        if peer is None:
            return True
        with self._lock:
            known = self._images.get(record.id)
            return (
                known is not None
                and peer in known.served
                and (known.epoch, known.holder) == (record.epoch, record.holder)
                and record.used is None
            )

    def admit(self, name: ImageName, peer: str, record: ImageRecord) -> None:
        """Write down that a process is served from now on.

        Raises ClientBarred, and HciError where it cannot be written: the client is not let in.
        """
        assert record.holder is not None and record.used is None, "we have it for clients"
        with self._lock:
            known = self._images.setdefault(record.id, _Image(record.epoch, record.holder))
            if peer in known.barred:
                raise ClientBarred(str(name))
            if peer not in known.served and self._count() >= PROCESSES_MAX:
                self._drop_ended()
                if self._count() >= PROCESSES_MAX:
                    raise HciError(f"this gateway serves {PROCESSES_MAX} processes, and no more")
            known.served.add(peer)
        if not self.save():
            raise HciError(
                f"{self._file} cannot be written, and {name} is served to nobody who is not "
                "written down there: see the gateway's log"
            )

    def left(self, image: ImageId, peer: str) -> None:
        """Note that a process has closed its last connection to an image that is served."""
        with self._lock:
            known = self._images.get(image)
            if known is not None:
                known.served.discard(peer)

    def remember(self, image: ImageId, memory: Mapping[str, str]) -> bool:
        """Note in which boot each node in sync has all that was answered; say whether it is new."""
        with self._lock:
            if self._memory.get(image) == memory:
                return False
            self._memory[image] = dict(memory)
            return True

    def memory(self, image: ImageId) -> Mapping[str, str]:
        """Return what was noted last; nothing where no process lives that was served then."""
        with self._lock:
            known = self._images.get(image)
            if known is None or not any(self._lives(peer) for peer in known.served):
                return {}
            return self._memory.get(image, {})

    def awaits(self, image: ImageId) -> bool:
        """Whether a process lives that was served and has not left by itself: it may come back."""
        with self._lock:
            known = self._images.get(image)
            return known is not None and any(self._lives(peer) for peer in known.served)

    def forget_memory(self, image: ImageId) -> None:
        """An image is closed; what matters to those who may come back stays."""
        with self._lock:
            known = self._images.get(image)
            if known is None or not known.served:
                self._memory.pop(image, None)

    def lost(self, image: ImageId) -> None:
        """Note that an image is another's: whom it was served to is barred."""
        with self._lock:
            self._fenced = replace(self._fenced, images=self._fenced.images + 1)
            known = self._images.get(image)
            if known is not None:
                self._bar(image, known)

    def fenced(self) -> Fenced:
        """Return what was lost, and to whom that was told, since this process began."""
        with self._lock:
            return self._fenced

    def save(self) -> bool:
        """Write down what is known; return whether that was possible. Not for a hot path."""
        if self._file is None:
            return True
        with self._writing:
            with self._lock:
                self._drop_ended()
                text = self._text()
            try:
                self._file.write(text)
            except OSError as error:
                log.error("served_not_written", path=str(self._file), why=str(error))
                return False
        return True

    def _bar(self, image: ImageId, known: _Image) -> None:
        for peer in sorted(known.served):
            log.warning("client_barred", image=image, process=peer)
        barred = self._fenced.barred + len(known.served)
        self._fenced = replace(self._fenced, barred=barred)
        known.barred |= known.served
        known.served = set()

    def _count(self) -> int:
        return sum(len(known.served) + len(known.barred) for known in self._images.values())

    def _drop_ended(self) -> None:
        processes = {peer for known in self._images.values() for peer in known.served}
        processes |= {peer for known in self._images.values() for peer in known.barred}
        living = {peer for peer in processes if self._lives(peer)}
        for image, known in list(self._images.items()):
            known.served &= living
            known.barred &= living
            if not known.served and not known.barred:
                del self._images[image]

    def _text(self) -> str:
        images = {
            image: {
                "epoch": known.epoch,
                "holder": known.holder,
                "served": sorted(known.served),
                "barred": sorted(known.barred),
                "memory": self._memory.get(image, {}),
            }
            for image, known in self._images.items()
        }
        document = {"v": VERSION, "boot": self._boot, "holders": self._holders, "images": images}
        return json.dumps(document, sort_keys=True)

    def _read(self, file: ServedFile) -> None:
        try:
            text = file.read()
            if text is None:
                return
            document = json.loads(text)
            if document["boot"] != self._boot:
                return
            if document["v"] != VERSION:
                raise ValueError(f"version {document['v']} is not {VERSION}")
            self._holders = [str(holder) for holder in document["holders"]]
            self._images = {
                ImageId(image): _image(values) for image, values in document["images"].items()
            }
            self._memory = {
                ImageId(image): {str(k): str(v) for k, v in values.get("memory", {}).items()}
                for image, values in document["images"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            # Written whole by every process, so the host went down while it was: no client lives.
            log.error("served_not_readable", path=str(file), why=str(error))
            self._holders, self._images, self._memory = [], {}, {}


def _image(values: Mapping[str, Any]) -> _Image:
    return _Image(
        epoch=int(values["epoch"]),
        holder=str(values["holder"]),
        served={str(peer) for peer in values["served"]},
        barred={str(peer) for peer in values["barred"]},
    )


def process_lives(peer: str) -> bool:
    """Whether a process runs on this host; one that cannot be told is taken to run."""
    pid, _, began = peer.partition(":")
    if not pid.isdigit() or not began.isdigit():
        return True
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            stat = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return False
    except OSError:
        return True
    # proc(5): field 22 is the start time; the second is in parentheses and may hold anything.
    after_name = stat[stat.rindex(b")") + 2 :].split()
    return after_name[19].decode() == began
