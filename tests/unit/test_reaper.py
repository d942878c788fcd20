"""What the tests start ends with the test process, also where that is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
GONE_WITHIN_S = 60.0

PARENT = """
import subprocess, sys, time
from pathlib import Path
from tests import reaper

kept, forgotten = map(Path, sys.argv[1:])
reaper.watch(kept, remove=True)
reaper.watch(forgotten, remove=True)
reaper.forget(forgotten)
argv = [sys.executable, "-c", "import time; time.sleep(300)"]
for folder in (kept, forgotten):
    print(subprocess.Popen([*argv, f"{folder}/data"], start_new_session=True).pid, flush=True)
time.sleep(300)
"""


def test_processes_of_a_killed_test_process_are_ended_and_its_folders_removed(
    tmp_path: Path,
) -> None:
    kept, forgotten = tmp_path / "kept", tmp_path / "forgotten"
    kept.mkdir()
    forgotten.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, kept, forgotten],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        left, stays = (int(parent.stdout.readline()) for _ in range(2))
        parent.kill()
    try:
        deadline = time.monotonic() + GONE_WITHIN_S
        while kept.exists() or _is_running(left):
            assert time.monotonic() < deadline, "the process or its folder is still there"
            time.sleep(0.05)
        assert _is_running(stays)
        assert forgotten.is_dir()
    finally:
        os.kill(stays, signal.SIGKILL)


def _is_running(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
