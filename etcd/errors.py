"""Errors of cluster state.

HciError
└── EtcdError
    ├── EtcdUnavailable      no endpoint answered; nothing was changed: try again
    ├── OutcomeUnknown       a change was sent and not answered: read again
    ├── LeaseNotFound        an etcd lease expired or was revoked: take a new one
    ├── EtcdRefused          etcd answered with a refusal: give up, tell a person
    ├── ClientClosed         the client was closed meanwhile: give up
    └── RecordError          a value in etcd that this version cannot use: tell a person
        ├── MalformedRecord
        └── UnknownVersion
"""

from shard.errors import HciError


class EtcdError(HciError):
    """Cluster state could not be read or changed."""


class EtcdUnavailable(EtcdError):
    """No endpoint answered, and nothing was changed. The caller may try again."""

    def __init__(self, endpoints: tuple[str, ...], detail: str) -> None:
        self.endpoints = endpoints
        self.detail = detail
        super().__init__(
            f"etcd is not reachable at {', '.join(endpoints)} ({detail}); "
            "check that its members run and that the network reaches them"
        )


class OutcomeUnknown(EtcdError):
    """A change was sent, and whether etcd took it is not known.

    The caller reads again: its own proposal found there is success. It may still be taken later,
    as long as what it compares stays as it is.
    """

    def __init__(self, endpoint: str, detail: str) -> None:
        self.endpoint = endpoint
        self.detail = detail
        super().__init__(
            f"etcd at {endpoint} did not answer a change ({detail}); "
            "look whether it was made before trying again"
        )


class LeaseNotFound(EtcdError):
    """An etcd lease expired or was revoked, and its keys are gone. The caller takes a new one."""

    def __init__(self, lease: int) -> None:
        self.lease = lease
        super().__init__(f"etcd lease {lease:x} expired; what was bound to it is gone")


class EtcdRefused(EtcdError):
    """etcd answered with a refusal that trying again does not change (no space, no permission)."""

    def __init__(self, endpoint: str, detail: str) -> None:
        self.endpoint = endpoint
        self.detail = detail
        super().__init__(f"etcd at {endpoint} refused: {detail}; see its log and its alarms")


class ClientClosed(EtcdError):
    """The client was closed while the call was made."""

    def __init__(self) -> None:
        super().__init__("the connection to etcd was closed")


class RecordError(EtcdError):
    """A value in etcd that this version cannot use. `key` names where it stands."""


class MalformedRecord(RecordError):
    """A value that is not the record its key promises."""

    def __init__(self, key: str, problem: str) -> None:
        self.key = key
        self.problem = problem
        super().__init__(f"the record {key} in etcd is malformed: {problem}; restore it")


class UnknownVersion(RecordError):
    """A record that a newer version wrote and that this one must not guess at."""

    def __init__(self, key: str, version: int, known: int) -> None:
        self.key = key
        self.version = version
        super().__init__(
            f"the record {key} in etcd has version {version}, this program knows {known}; "
            "upgrade this host"
        )
