"""The command `hci`.

One module per group of commands. An expected failure is one line on stderr and exit status 1, wrong
usage is 2, an interrupt is 130. What a command prints for programs (`--json`) goes to stdout alone.
"""

import os
import re
import signal
import sys
from collections.abc import Sequence
from itertools import pairwise, takewhile
from types import FrameType
from typing import NoReturn

from shard.errors import BadValue, HciError

COUNTS = ("--nodes", "--gateways", "--replica-sets")
"""Options whose value is a count, with a least one that the parser knows."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and end the process with its exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    if not is_daemon(given):
        signal.signal(signal.SIGTERM, _ended)
    try:
        from hci.cli.app import app

        app(checked(config_first(given)), prog_name="hci")
    except HciError as error:
        _fail(str(error), error)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}", error)
    except UnicodeError as error:
        _fail(f"a name or a value that was given is not UTF-8: {error}", error)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def config_first(arguments: Sequence[str]) -> list[str]:
    """Put `--config FILE` before the command's name, so that a person may write it anywhere.

    Without a value it is left alone: the parser says so then, and would take the next word for it.
    """
    found: list[str] = []
    rest: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--":
            rest += [argument, *remaining]
        elif argument == "--config":
            value = next(remaining, None)
            if value is None or value.startswith("--"):
                return [argument]
            found += [argument, value]
        elif argument.startswith("--config="):
            found.append(argument)
        else:
            rest.append(argument)
    return found + rest


def is_daemon(arguments: Sequence[str]) -> bool:
    """Whether this process becomes a daemon, which says itself what a signal means to it.

    Until it does, it has nothing to undo and may end at once. An exception that a signal's handler
    raises may be lost, in a callback of an import, and the daemon would never end.
    """
    return any(
        kind in ("node", "gateway", "arbiter") and command == "serve"
        for kind, command in pairwise(arguments)
    )


def checked(arguments: Sequence[str]) -> list[str]:
    """Return the arguments; raises BadValue for a negative number, which no command takes.

    The parser would take it for an option, but for the value of one that counts: that it refuses.
    """
    before_end = list(takewhile(lambda argument: argument != "--", arguments))
    for before, argument in pairwise(["", *before_end]):
        if before not in COUNTS and re.match(r"-\.?[0-9]", argument):
            raise BadValue(f"{argument!r} is negative; sizes and counts are not")
    return list(arguments)


def _fail(message: str, error: Exception) -> NoReturn:
    if os.environ.get("HCI_TRACEBACK"):
        raise error
    print("hci:", " ".join(message.split()), file=sys.stderr)  # noqa: T201
    sys.exit(1)


def _ended(number: int, _frame: FrameType | None) -> None:
    """Unwind, so that what is half done is undone."""
    sys.exit(128 + number)
