"""Errors of the thin arbiter, on both sides of the wire.

HciError
└── ArbiterError
    ├── ArbiterUnreachable      no answer: nothing is known to be granted; try again
    ├── OtherArbiter            another arbiter, or an emptied one, answers there: tell a person
    ├── ArbiterBehind           an older copy of its disk was put back: tell a person
    ├── ArbiterFailed           it answered that it cannot: its disk, its version; try again
    ├── VoteRefused             it knows a later history than the asker: stop serving the image
    └── RecordError             its own data directory cannot be used: replace the arbiter
        ├── ForeignRecord       another cluster's or another arbiter's
        ├── RecordDamaged       a file is torn or does not match its digest
        └── RecordBusy          another process uses it
"""

from arbiter.vote import Refusal
from shard.errors import HciError


class ArbiterError(HciError):
    """The thin arbiter did not grant what was asked."""


class ArbiterUnreachable(ArbiterError):
    """The arbiter did not answer; what it was asked may be done or not. Asking again is safe."""

    def __init__(self, name: str, address: str, detail: str) -> None:
        self.name = name
        self.address = address
        super().__init__(
            f"arbiter {name} does not answer at {address} ({detail}); start it, "
            "or replace it with `hci arbiter replace`"
        )


class OtherArbiter(ArbiterError):
    """Who answers is not the arbiter that is registered under this name: another, or emptied."""

    def __init__(self, name: str, address: str, detail: str) -> None:
        self.name = name
        super().__init__(
            f"what answers at {address} is not the registered arbiter {name} ({detail}); "
            "correct its address, or replace it with `hci arbiter replace`"
        )


class ArbiterBehind(ArbiterError):
    """The arbiter has forgotten what it was seen to know."""

    def __init__(self, name: str, detail: str) -> None:
        self.name = name
        super().__init__(
            f"arbiter {name} is behind what it was seen to know ({detail}): an older copy of its "
            "disk was put back; use the current one, or `hci arbiter replace`"
        )


class ArbiterFailed(ArbiterError):
    """The arbiter answered that it cannot do what it was asked."""

    def __init__(self, name: str, detail: str) -> None:
        self.name = name
        self.detail = detail
        super().__init__(
            f"arbiter {name} cannot vote: {detail}; it is asked again by itself: see to its disk "
            "and its log, or replace it with `hci arbiter replace`"
        )


class VoteRefused(ArbiterError):
    """The arbiter knows a later history of the image than the asker does."""

    def __init__(self, name: str, image: str, refusal: Refusal) -> None:
        self.name = name
        self.image = image
        self.refusal = refusal
        super().__init__(
            f"arbiter {name} refuses a change of image {image}: {refusal.value}; "
            "another gateway has it, or etcd lost history"
        )


class RecordError(ArbiterError):
    """An arbiter's data directory cannot be used."""


class ForeignRecord(RecordError):
    """The data directory holds the record of another arbiter or cluster."""

    def __init__(self, data_dir: str, what: str, expected: str, found: str) -> None:
        super().__init__(
            f"{data_dir} holds the record of {what} {found}, the configuration says {expected}; "
            "correct data_dir, or use an empty one under a new name"
        )


class RecordDamaged(RecordError):
    """A file of the record is torn, or does not match its digest, or lacks its like."""

    def __init__(self, path: str, detail: str) -> None:
        self.path = path
        super().__init__(
            f"{path} is damaged ({detail}) and is not believed; start an arbiter with an empty "
            "data_dir and a new name, then `hci arbiter replace`"
        )


class RecordBusy(RecordError):
    """Another process uses the data directory."""

    def __init__(self, data_dir: str) -> None:
        super().__init__(
            f"another process uses {data_dir}: stop it first, or give this one another data_dir"
        )
