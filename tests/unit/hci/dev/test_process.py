"""Background processes: recorded, found again, and never taken for another."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from hci.dev import process
from hci.dev.process import Process

SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]
STUBBORN = [
    sys.executable,
    "-c",
    """from signal import *
import time
signal(SIGTERM, SIG_IGN)
print("up", flush=True)
time.sleep(60)""",
]

HEADLESS = [
    sys.executable,
    "-c",
    """import ctypes, threading, time
threading.Thread(target=time.sleep, args=(60,)).start()
print("up", flush=True)
ctypes.CDLL(None).pthread_exit(None)""",
]


class Spawner:
    """Starts processes and sees to it that none outlives the test."""

    def __init__(self, folder: Path) -> None:
        self.record = folder / "pid" / "it.json"
        self.log = folder / "log" / "it.log"
        self.started: list[process.subprocess.Popen[bytes]] = []

    def __call__(self, command: list[str]) -> Process:
        self.started.append(process.spawn(command, self.record, self.log, environ=os.environ))
        found = process.read(self.record)
        assert found is not None
        while command[0] == sys.executable and "up" not in self.log.read_text():
            assert self.started[-1].poll() is None
        return found


@pytest.fixture
def spawn(tmp_path: Path) -> Iterator[Spawner]:
    spawner = Spawner(tmp_path)
    yield spawner
    for started in spawner.started:
        started.kill()
        started.wait()


def test_process_that_runs_is_alive_and_in_a_session_of_its_own(spawn: Spawner) -> None:
    found = spawn(SLEEP)
    assert found.is_alive
    assert os.getsid(found.pid) == found.pid


def test_process_that_is_started_while_an_interrupt_comes_has_its_record(
    spawn: Spawner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C between the start of a node and the writing of its record left that node running."""
    write = process.layout.write

    def interrupted(path: Path, text: str) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        write(path, text)

    monkeypatch.setattr(process.layout, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        process.spawn(SLEEP, spawn.record, spawn.log, environ=os.environ)
    found = process.read(spawn.record)
    assert found is not None
    assert found.is_alive
    process.kill([found])


def test_process_that_was_killed_is_not_alive_even_before_its_parent_looks(spawn: Spawner) -> None:
    found = spawn(SLEEP)
    process.kill([found])
    assert not found.is_alive
    assert not found.signal(signal.SIGTERM)


def test_process_is_alive_until_its_last_thread_has_ended(spawn: Spawner) -> None:
    """A killed gateway was taken for ended while a thread of it still had the port."""
    found = spawn(HEADLESS)
    while "\nState:\tZ" not in Path(f"/proc/{found.pid}/status").read_text():
        assert spawn.started[0].poll() is None
    assert found.is_alive
    assert not found.wait(0.05)
    process.kill([found])
    assert not found.is_alive


def test_process_of_another_start_time_is_not_signalled(spawn: Spawner) -> None:
    """The pid in an old record may meanwhile belong to anybody."""
    found = spawn(SLEEP)
    recycled = replace(found, start_ticks=found.start_ticks - 1)
    before_reboot = replace(found, boot_id="another")
    for stranger in (recycled, before_reboot):
        assert not stranger.is_alive
        assert not stranger.signal(signal.SIGKILL)
        assert stranger.wait(0)
    assert found.is_alive


def test_process_that_stops_when_asked_is_not_killed(spawn: Spawner) -> None:
    assert process.end([spawn(SLEEP)], grace_s=30) == []
    assert spawn.started[0].wait() == -signal.SIGTERM


def test_process_that_ignores_being_asked_is_killed(spawn: Spawner) -> None:
    found = spawn(STUBBORN)
    assert process.end([found], grace_s=0.2) == [found]
    assert spawn.started[0].wait() == -signal.SIGKILL


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}', '{"pid": 1}'])
def test_record_that_is_damaged_records_nothing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "it.json"
    assert process.read(path) is None
    path.write_text(text)
    assert process.read(path) is None


def test_record_is_read_back(tmp_path: Path) -> None:
    found = Process.of_pid(os.getpid())
    assert found is not None
    assert found.is_alive
    (tmp_path / "it.json").write_text(json.dumps(asdict(found)))
    assert process.read(tmp_path / "it.json") == found


def test_last_line_of_a_log_skips_what_is_empty(tmp_path: Path) -> None:
    log = tmp_path / "it.log"
    assert process.last_line(log) == ""
    log.write_text("first\n  the reason \n\n")
    assert process.last_line(log) == "the reason"
    log.write_text("x" * 20000)
    assert process.last_line(log) == "x" * process.LOG_LINE_MAX
