"""README.md: its code blocks are shell as it stands, and every command in them exists."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from hci.cli.app import app

PROJECT = Path(__file__).resolve().parents[2]


def code() -> list[str]:
    """The indented lines, of which those that end with a backslash go on in the next."""
    text = (PROJECT / "README.md").read_text().replace("\\\n", "")
    return [line.strip() for line in text.splitlines() if line.startswith("    ")]


def test_code_blocks_are_shell() -> None:
    assert len(code()) > 20
    done = subprocess.run(["bash", "-n"], input="\n".join(code()), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def commands(program: str) -> list[list[str]]:
    """What is called of a program, as the shell would split it: notes are none of its arguments."""
    found = []
    for line in code():
        words = shlex.split(line.replace("url=$(", "").replace(")  ", "  "), comments=True)
        if words[:1] == [program]:
            found.append(words[1:])
    return found


def test_every_target_of_make_exists() -> None:
    makefile = (PROJECT / "Makefile").read_text()
    for target, *settings in commands("make"):
        assert re.search(f"^{target}:", makefile, re.MULTILINE), target
        assert all("=" in each for each in settings), f"make {target}: a note that is no comment"


@pytest.mark.parametrize("words", commands("hci"), ids=" ".join)
def test_every_hci_command_takes_its_arguments(words: list[str]) -> None:
    command: Any = get_command(app)
    for name in list(words):
        if not hasattr(command, "commands"):
            break
        command = command.get_command(None, name)
        assert command is not None, name
        words = words[1:]
    # A word too many is wrong usage.
    command.make_context("hci", list(words))
