"""`.ci/as_root.py`: by sudo where needed, with the same environment, and no litter of root's.

sudo itself is not at work here: in its place the first half's command line is noted down, as the
user who would call it, and then run by root, who runs this.
"""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / ".ci" / "as_root.py"
USER = GROUP = 54321
PYTHON = "/usr/bin/python3"
"""That of the tests may stand where only root can enter."""

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="needs root, to be another user and to make files that are root's"
)


@pytest.fixture
def project() -> Iterator[Path]:
    """A tree of that user's with the script in it, and programs of its own in `bin`."""
    # Not below pytest's folder, which only its owner may enter.
    with tempfile.TemporaryDirectory(prefix="hci-as-root-") as name:
        path = Path(name)
        (path / ".ci").mkdir()
        shutil.copy(SCRIPT, path / ".ci")
        (path / "bin").mkdir()
        (path / "home" / ".cargo").mkdir(parents=True)
        for each in (path, *path.rglob("*")):
            os.chown(each, USER, GROUP)
        yield path


def asked_of_sudo(project: Path, *command: str) -> list[str]:
    """Runs the script as the user; returns with what it calls sudo."""
    noted = project / "noted"
    sudo = project / "bin" / "sudo"
    sudo.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" >{noted}\nexit 3\n")
    sudo.chmod(stat.S_IRWXU | stat.S_IROTH | stat.S_IXOTH)
    assert as_user(project, *command).returncode == 3
    return noted.read_text().splitlines()


def as_user(project: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PYTHON, str(project / ".ci" / "as_root.py"), *command],
        user=USER,
        group=GROUP,
        extra_groups=[],
        env={"PATH": f"{project}/bin", "HOME": f"{project}/home", "LOGNAME": "alice"},
        capture_output=True,
        text=True,
    )


def owners(project: Path) -> set[int]:
    return {path.lstat().st_uid for path in project.rglob("*")}


def test_command_of_a_user_is_run_by_sudo_and_leaves_no_file_of_roots(project: Path) -> None:
    wrote = (
        'mkdir -p "$HOME/.cargo/registry" deep/er && touch "$HOME/.cargo/registry/x" deep/er/y && '
        'ln -s /etc/passwd deep/link && echo "$(id -u) $LOGNAME $PATH"; exit 7'
    )
    preserve, *command = asked_of_sudo(project, "/bin/sh", "-c", wrote)
    assert preserve == "--preserve-env"
    # What a sudoers file says of PATH and HOME does not count.
    sudos = {"PATH": "/usr/bin:/bin", "HOME": "/root", "LOGNAME": "alice"}
    command = [*command[:-1], f"PATH=$PATH:/usr/bin:/bin; {command[-1]}"]
    done = subprocess.run(command, cwd=project, env=sudos, capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert done.stdout.split() == ["0", "root", f"{project}/bin:/usr/bin:/bin"]
    assert owners(project) - {USER} == set()
    assert (project / "deep" / "er" / "y").stat().st_gid == GROUP
    assert (project / "home" / ".cargo" / "registry" / "x").exists()
    assert Path("/etc/passwd").stat().st_uid == 0, "a link is not followed"


def test_end_that_sudo_passes_on_reaches_the_command(project: Path) -> None:
    wait = f"import time; open({str(project / 'began')!r}, 'w').close(); time.sleep(60)"
    command = asked_of_sudo(project, PYTHON, "-c", wait)[1:]
    process = subprocess.Popen(command)
    while not (project / "began").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=50) == 128 + signal.SIGTERM
    assert owners(project) - {USER} == set()


def test_user_without_sudo_is_told_what_to_do(project: Path) -> None:
    done = as_user(project, "/bin/true")
    assert done.returncode == 1
    assert "there is no sudo: run it\nas root, or install sudo" in done.stderr
    assert 'make test TESTS="tests/unit' in done.stderr


def test_root_needs_no_sudo(project: Path) -> None:
    script = str(project / ".ci" / "as_root.py")
    done = subprocess.run([PYTHON, script, "/bin/sh", "-c", "exit 5"], env={"PATH": "/none"})
    assert done.returncode == 5
