"""Ends what a test process leaves behind when it dies before it could clean up.

A process of its own, which survives its parent however that ends, SIGKILL included: its input is a
pipe that only the parent writes to. Each line is a letter and a folder: `k` kill at the end every
process whose command line names it, `r` remove it too, `f` forget it. When the pipe ends it does
so. A dev cluster's folder says in `hci.toml` where its sockets are; that folder goes the same way.

`watch` and `forget` are the parent's side.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

# What is killed may just have started something, which is found by the next look.
LOOKS = 20
LOOK_AGAIN_S = 0.1

_started: subprocess.Popen[bytes] | None = None


def watch(folder: Path, *, remove: bool) -> None:
    """Has processes that name `folder` killed once this process is gone, and it removed."""
    _tell("r" if remove else "k", folder)


def forget(folder: Path) -> None:
    """Takes `watch` back: the folder was cleaned up."""
    _tell("f", folder)


def _tell(what: str, folder: Path) -> None:
    global _started  # noqa: PLW0603 - one for the whole process, started when first needed
    if _started is None:
        _started = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is not for it
        )
        atexit.register(_end, _started)
    assert _started.stdin is not None
    _started.stdin.write(os.fsencode(f"{what}{folder}\n"))
    _started.stdin.flush()


def _end(started: subprocess.Popen[bytes]) -> None:
    assert started.stdin is not None
    with contextlib.suppress(OSError):
        started.stdin.close()
    started.wait()


def main() -> None:
    """Waits for the parent's end, then cleans up."""
    folders: dict[Path, bool] = {}
    for line in sys.stdin.buffer:
        what, folder = chr(line[0]), Path(os.fsdecode(line[1:].rstrip(b"\n")))
        if what == "f":
            folders.pop(folder, None)
        else:
            folders[folder] = what == "r"
    for folder in list(folders):
        if sockets := _run_dir(folder):
            folders[sockets] = True
    if not folders:
        return
    for _ in range(LOOKS):
        if not _kill(folders):
            break
        time.sleep(LOOK_AGAIN_S)
    for folder, remove in folders.items():
        if remove:
            shutil.rmtree(folder, ignore_errors=True)


def _run_dir(folder: Path) -> Path | None:
    try:
        return Path(tomllib.loads((folder / "hci.toml").read_text())["dev"]["run_dir"])
    except (OSError, ValueError, KeyError):
        return None


def _kill(folders: dict[Path, bool]) -> bool:
    """Kills every process that names one of the folders; whether there was any."""
    names = b"|".join(re.escape(os.fsencode(folder)) for folder in folders)
    named = re.compile(rb"(?:%s)(?![^/\0,:&?\s])" % names)
    found = False
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int(entry.name) != os.getpid() and named.search((entry / "cmdline").read_bytes()):
                os.kill(int(entry.name), signal.SIGKILL)
                found = True
    return found


if __name__ == "__main__":
    main()
