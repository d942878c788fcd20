"""What a measure has found, as tables of a terminal, as Markdown, and on which machine it was."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import rich.table

from bench.goals import Verdict

PROJECT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Table:
    """Lines of text; the first column is of words, the others of figures."""

    header: Sequence[str]
    lines: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """What one measure has found. `figures` is its part of the JSON."""

    title: str
    about: str
    tables: Sequence[Table]
    verdicts: Sequence[Verdict] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)


def terminal(table: Table) -> rich.table.Table:
    """A table for people who sit before it."""
    made = rich.table.Table()
    for number, title in enumerate(table.header):
        made.add_column(title, justify="right" if number else "left")
    for line in table.lines:
        made.add_row(*line)
    return made


def markdown(about: str, sections: Sequence[Section]) -> str:
    """All of it for the documentation, the machine described above it."""
    text = [about]
    for section in sections:
        text += ["", f"### {section.title}", "", section.about]
        for table in section.tables:
            text += ["", "| " + " | ".join(table.header) + " |"]
            text.append("| --- |" + " ---: |" * (len(table.header) - 1))
            text += ["| " + " | ".join(line) + " |" for line in table.lines]
    return "\n".join(text) + "\n"


def machine() -> dict[str, str]:
    """What the figures were taken on, and with which versions of the peers."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    described = {
        "processor": cpu.group(1) if cpu else platform.machine(),
        "cores": str(os.cpu_count()),
        "memory_gib": f"{int(memory.group(1)) / (1 << 20):.0f}" if memory else "unknown",
        "kernel": platform.release(),
    }
    for program in ("fio", "nbdkit", "gluster", "etcd", "qemu-nbd"):
        if shutil.which(program):
            done = subprocess.run(
                [program, "--version"], check=False, capture_output=True, text=True, timeout=30
            )
            described[program] = (done.stdout.strip().splitlines() or ["unknown"])[0]
    return described


def commit() -> str:
    """The commit that is measured, with `+` where files differ from it."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*", "--abbrev=10"],
            cwd=PROJECT,
            check=True,
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return described.stdout.strip()
