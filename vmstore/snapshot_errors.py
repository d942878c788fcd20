"""Errors of snapshots and rollbacks: one line each, as in `vmstore.errors`.

VmstoreError
├── SnapshotExists
├── TooManySnapshots       an image's record has no room for another one
├── HasSnapshots           an image that is to be removed
├── SnapshotFailed         none was taken
├── SnapshotUnknown        it is not known whether one was
├── BeingSnapshotted       a snapshot of the image is being taken
├── NewerSnapshots         a rollback would remove some, and is not forced to
├── RollbackFailed         the image holds what it held
├── RollbackUnknown        it is not known whether it does
├── BeingRolledBack        a rollback of the image is being made
├── RemovalFailed          a snapshot is there as it was
├── RemovalUnknown         it is not known whether it is
└── BeingRemoved           a snapshot of the image is being removed
"""

from collections.abc import Sequence

from vmstore.errors import VmstoreError


class SnapshotExists(VmstoreError):
    """An image has a snapshot of this name."""

    def __init__(self, image: str, name: str) -> None:
        self.image = image
        self.name = name
        super().__init__(f"{image} has a snapshot {name} already; choose another name")


class TooManySnapshots(VmstoreError):
    """An image's record has no room for another snapshot."""

    def __init__(self, image: str, count: int, why: str) -> None:
        self.image = image
        self.count = count
        super().__init__(f"{image} has {count} snapshots, and {why}")


class HasSnapshots(VmstoreError):
    """An image has snapshots, and was to be removed without them."""

    def __init__(self, image: str, names: Sequence[str]) -> None:
        self.image = image
        self.names = names
        several = len(names) > 1
        count = f"{len(names)} snapshots" if several else "1 snapshot"
        super().__init__(
            f"{image} is not removed: it has {count} ({names[0]}{', …' if names[1:] else ''}); "
            f"remove {'them' if several else 'it'} with `hci snapshot rm`, or use --with-snapshots"
        )


class SnapshotFailed(VmstoreError):
    """No snapshot was taken; the text says why."""

    def __init__(self, name: str, why: str) -> None:
        self.name = name
        self.why = why
        super().__init__(f"no snapshot {name} was taken: {why}")


class SnapshotUnknown(VmstoreError):
    """etcd has a snapshot, and whether its nodes have is not known: whoever opens the image finds
    out."""

    def __init__(self, name: str, why: str) -> None:
        self.name = name
        self.why = why
        super().__init__(
            f"it is not known whether {name} was taken: {why}; run the command again, which finds "
            "that it exists if it was"
        )


class BeingSnapshotted(VmstoreError):
    """A snapshot of an image is being taken, and nothing else changes its record meanwhile."""

    def __init__(self, image: str) -> None:
        self.image = image
        super().__init__(f"a snapshot of {image} is being taken; try again when that is done")


class NewerSnapshots(VmstoreError):
    """An image has snapshots above the one that it was to go back to."""

    def __init__(self, image: str, name: str, newer: Sequence[str]) -> None:
        self.image = image
        self.name = name
        self.newer = newer
        super().__init__(
            f"{image} is not rolled back to {name}: newer snapshots would go with what they hold "
            f"({', '.join(newer)}); use --force if they are not needed"
        )


class RollbackFailed(VmstoreError):
    """An image was not rolled back; the text says why."""

    def __init__(self, name: str, why: str) -> None:
        self.name = name
        self.why = why
        super().__init__(f"nothing was rolled back to {name}: {why}")


class RollbackUnknown(VmstoreError):
    """etcd was asked for a rollback, and whether it is made is not known. Asking again is safe."""

    def __init__(self, name: str, why: str) -> None:
        self.name = name
        self.why = why
        super().__init__(
            f"it is not known whether the image is rolled back to {name}: {why}; run the command "
            "again before anybody opens it"
        )


class BeingRolledBack(VmstoreError):
    """An image is being rolled back, and nobody uses or changes it meanwhile."""

    def __init__(self, image: str) -> None:
        self.image = image
        super().__init__(f"{image} is being rolled back; try again when that is done")


class RemovalFailed(VmstoreError):
    """A snapshot was not removed; the text says why."""

    def __init__(self, name: str, why: str) -> None:
        self.name = name
        self.why = why
        super().__init__(f"{name} is not removed: {why}")


class RemovalUnknown(VmstoreError):
    """etcd was asked to remove a snapshot, and whether it has is not known."""

    def __init__(self, name: str, why: str) -> None:
        self.name = name
        self.why = why
        super().__init__(
            f"it is not known whether {name} is removed: {why}; run the command again, which finds "
            "no such snapshot if it is"
        )


class BeingRemoved(VmstoreError):
    """A snapshot of an image is being removed, and nothing else changes its record meanwhile."""

    def __init__(self, image: str, name: str) -> None:
        self.image = image
        self.name = name
        super().__init__(f"{image}@{name} is being removed; try again when that is done")
