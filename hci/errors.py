"""Errors of the command line, the configuration and the daemons' control services.

HciError                    one line for a person (`shard.errors`)
├── ConfigError             the configuration is missing or wrong; correct the file
├── ControlError            a daemon could not be asked
│   ├── Unreachable         no answer; start it, or ask again
│   ├── OpenElsewhere       no answer from another host's gateway; run the command there
│   ├── Refused             it answered that it cannot; the text says why
│   └── Undecided           it answered that it does not know what became of it
├── DaemonError             a daemon cannot start, or a part of it has failed
├── DevError                a cluster on this machine did not do what was asked
├── ScrubFailed             a scrub that was waited for did not come to its end
└── Unsupported             this build or machine lacks what was asked for
"""

from pathlib import Path

from shard.errors import HciError


class ConfigError(HciError):
    """The configuration is missing or wrong. `path` is the file, where there is one."""

    def __init__(self, message: str, path: Path | None = None) -> None:
        self.path = path
        super().__init__(f"{path}: {message}" if path else message)


class ControlError(HciError):
    """A daemon could not be asked to do something."""

    def __init__(self, message: str, daemon: str, address: str) -> None:
        self.daemon = daemon
        self.address = address
        super().__init__(message)


class Unreachable(ControlError):
    """The daemon did not answer in time. Whether it did what was asked is unknown: look again."""

    def __init__(self, daemon: str, address: str, advice: str) -> None:
        super().__init__(f"{daemon} does not answer at {address}: {advice}", daemon, address)


class OpenElsewhere(ControlError):
    """An image is open at a gateway of another host, which cannot be asked from here."""

    def __init__(self, image: str, gateway: str, host: str, address: str) -> None:
        self.image = image
        self.host = host
        super().__init__(
            f"{image} is open at {gateway} on {host}, which cannot be asked from here "
            f"(at {address}); run this command on {host}",
            gateway,
            address,
        )


class Refused(ControlError):
    """The daemon answered that it cannot. Its text is shown as it is."""


class Undecided(ControlError):
    """The daemon answered that it does not know whether it was done. Its text says how to see."""


class DaemonError(HciError):
    """A daemon cannot start, or a part of it has failed; the text says which and why."""


class DevError(HciError):
    """A cluster on this machine did not do what was asked."""


class Unsupported(HciError):
    """This build or this machine lacks what was asked for."""


class ScrubFailed(HciError):
    """A scrub that was waited for has ended early; ask for another one."""

    def __init__(self, image: str, why: str) -> None:
        super().__init__(
            f"the scrub of {image} has ended early: {why}; `hci scrub start {image}` begins another"
        )
