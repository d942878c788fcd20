"""How far something is: lines for logs, a bar for people."""

import io
import sys

import pytest

from hci.cli import output


class Screen(io.StringIO):
    """A terminal that keeps all that it was sent."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the clock says; a test sets it."""
    now = [0.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: now[0])
    return now


def test_progress_in_a_pipe_is_a_line_for_each_step_and_second_at_most(
    seconds: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with output.progress("importing a.img") as tell:
        for at_s, done in (
            *((0.5, 0.3), (1.0, 0.3), (1.5, 0.9)),  # 0.3 after a second; 0.9 comes too soon
            *((2.5, 0.35), (3.0, 0.39)),  # less than a step further
            *((3.5, 0.405), (5.0, 0.99), (9.0, 1.0)),
        ):
            seconds[0] = at_s
            tell(done)
    assert capsys.readouterr().out.splitlines() == [
        "importing a.img: 30%",
        "importing a.img: 40%",
        "importing a.img: 99%",
    ]


def test_progress_that_is_quick_says_nothing_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    with output.progress("comparing vms/a") as tell:
        tell(0.5)
        tell(1.0)
    assert capsys.readouterr().out == ""


def test_progress_on_a_screen_is_a_bar_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with output.progress("importing [red]a.img") as tell:
        tell(0.0)
        tell(0.42)
    shown = screen.getvalue()
    assert "importing [red]a.img" in shown, "a file's name is no markup"
    assert " 42 %" in shown
    assert "━" in shown
    assert shown.endswith("\x1b[2K"), "the line it stood on is cleared"


def test_progress_that_fails_leaves_the_screen_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    with pytest.raises(OSError, match="gone"):
        with output.progress("exporting vms/a"):
            raise OSError("gone")
    assert screen.getvalue().endswith("\x1b[2K")
    assert screen.getvalue().count("\x1b[?25l") == screen.getvalue().count("\x1b[?25h"), "a cursor"


def test_waiting_says_nothing_in_a_pipe_and_what_for_on_a_screen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with output.waiting("resizing vms/a"):
        pass
    assert capsys.readouterr().out == ""
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    with output.waiting("resizing [b]vms/a"):
        pass
    assert "resizing [b]vms/a" in screen.getvalue()
