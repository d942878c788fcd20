"""Runs a command as root, by sudo where this is not root, and leaves nothing that is root's behind.

    python .ci/as_root.py COMMAND…

The command keeps its environment, PATH and HOME too, where Rust may be. What it wrote into this
tree and into Cargo's folder is given to whom started it when it has ended, however it ended.
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

PROJECT = Path(__file__).resolve().parent.parent
FOR = "--for"
"""What this script says to itself when sudo runs it: user and group of whom it works for."""

NO_SUDO = """\
this needs root, for network namespaces, mounts and clocks of its own, and there is no sudo: run it
as root, or install sudo. These parts of the tests need neither:
    make test TESTS="tests/unit tests/sim tests/engine tests/cluster"
"""


def main(arguments: list[str]) -> NoReturn:
    """Ends with the exit status of the command, or with 1 where it cannot be run as root."""
    if arguments[:1] == [FOR]:
        user, group = (int(number) for number in arguments[1].split(":"))
        try:
            status = run(arguments[2:])
        finally:
            give_back(user, group)
        sys.exit(status)
    if os.geteuid() == 0:
        os.execvp(arguments[0], arguments)  # noqa: S606 - what was asked for
    if shutil.which("sudo") is None:
        sys.exit(NO_SUDO)
    # A sudoers file sets PATH and HOME, whatever is to be kept; and who runs this is root then.
    kept = [f"{name}={os.environ[name]}" for name in ("PATH", "HOME") if name in os.environ]
    environment = ["env", *kept, "USER=root", "LOGNAME=root"]
    itself = [sys.executable, __file__, FOR, f"{os.getuid()}:{os.getgid()}"]
    os.execvp("sudo", ["sudo", "--preserve-env", *environment, *itself, *arguments])  # noqa: S606


def run(command: list[str]) -> int:
    """Runs the command to its end; signals are for it."""
    process = subprocess.Popen(command)
    # Of Ctrl-C the terminal tells it too; that it is to end sudo tells only this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda heard, _frame: process.send_signal(heard))
    status = process.wait()
    return status if status >= 0 else 128 - status


def give_back(user: int, group: int) -> None:
    """Gives what is root's in this tree and in Cargo's folder to a user whose folders they are."""
    home = os.environ.get("HOME", "/")
    for top in (PROJECT, Path(os.environ.get("CARGO_HOME") or f"{home}/.cargo")):
        if not top.is_dir() or top.stat().st_uid != user:
            continue
        for folder, folders, files in os.walk(top):
            for path in (Path(folder, name) for name in (*folders, *files)):
                try:
                    if path.lstat().st_uid == 0:
                        os.chown(path, user, group, follow_symlinks=False)
                except FileNotFoundError:
                    continue


if __name__ == "__main__":
    main(sys.argv[1:])
