"""What a supervisor hears of a daemon."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hci import daemon, notify


class Supervisor:
    """A socket as systemd has one, and what was told through it since last asked."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.socket.bind(address)

    def heard(self) -> list[str]:
        found = []
        while True:
            try:
                found.append(self.socket.recv(4096).decode())
            except BlockingIOError:
                return found


@pytest.fixture
def supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Supervisor]:
    address = str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    made = Supervisor(address)
    yield made
    made.socket.close()


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch) -> daemon.Ending:
    monkeypatch.setattr(daemon.signal, "signal", lambda _number, _handler: None)
    monkeypatch.setattr(notify, "POLL_S", 0.0)
    return daemon.Ending()


def rounds(ending: daemon.Ending, count: int) -> Callable[[], None]:
    """A look that ends the daemon with its last round."""
    left = [count]

    def look() -> None:
        left[0] -= 1
        if not left[0]:
            ending.fail("a test")

    return look


def ticking(step_s: float) -> Callable[[], float]:
    """A clock that goes on by so much with each look at it."""
    now_s = [0.0]

    def clock() -> float:
        now_s[0] += step_s
        return now_s[0]

    return clock


def test_daemon_tells_that_it_serves_lives_and_ends(
    supervisor: Supervisor, ending: daemon.Ending
) -> None:
    notify.attend(ending, rounds(ending, 2), clock=ticking(notify.ALIVE_S))
    assert supervisor.heard() == ["READY=1", "WATCHDOG=1", "WATCHDOG=1", "STOPPING=1"]


def test_signs_of_life_are_seconds_apart(supervisor: Supervisor, ending: daemon.Ending) -> None:
    notify.attend(ending, rounds(ending, 20), clock=ticking(notify.ALIVE_S / 4))
    assert supervisor.heard().count("WATCHDOG=1") == 5


@pytest.mark.parametrize("error", [TimeoutError("a test"), RuntimeError("a test")])
def test_daemon_whose_other_loop_hangs_gives_no_sign_of_life(
    supervisor: Supervisor, ending: daemon.Ending, error: Exception
) -> None:
    def answers() -> None:
        raise error

    notify.attend(ending, rounds(ending, 3), answers, ticking(notify.ALIVE_S))
    assert supervisor.heard() == ["READY=1", "STOPPING=1"]


def test_abstract_socket_hears_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    heard = Supervisor(f"\0{tmp_path}")
    monkeypatch.setenv("NOTIFY_SOCKET", f"@{tmp_path}")
    notify.tell("READY=1")
    assert heard.heard() == ["READY=1"]
    heard.socket.close()


@pytest.mark.parametrize("where", ["", "vsock:2:1234", "/nowhere/notify"])
def test_nobody_who_hears_is_no_error(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", where)
    notify.tell("READY=1")


def test_supervisor_that_does_not_read_is_not_waited_for(supervisor: Supervisor) -> None:
    for _ in range(10_000):
        notify.tell("WATCHDOG=1")
    assert 0 < len(supervisor.heard()) < 10_000
