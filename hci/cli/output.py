"""How commands print: tables for people, JSON for programs, progress for those who wait."""

import io
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shard.geometry import format_size

if TYPE_CHECKING:
    from rich.console import Console

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_PIPE_COLUMNS = 400
"""A pipe has no width: lines are not broken where a program or grep reads them."""

_PLAIN_STEP = 0.1
_PLAIN_PAUSE_S = 1.0


def never_fail() -> None:
    """Have stdout print as an escape what it cannot encode.

    Names of files may be any bytes, and a command that has done its work must not fail as it says
    so. JSON stays JSON: programs read an escape of these bytes as what Python calls the file.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def console() -> "Console":
    """Return a console on stdout."""
    from rich.console import Console

    return Console(
        highlight=False,
        emoji=False,
        markup=False,
        width=None if sys.stdout.isatty() else _PIPE_COLUMNS,
    )


def as_json(value: Any) -> None:
    """Print a value as JSON."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], nothing: str) -> None:
    """Print rows under headings, or the line `nothing` where there are none."""
    from rich.table import Table
    from rich.text import Text

    laid_out = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        laid_out.add_column(Text(column), no_wrap=True)
    for row in rows:
        laid_out.add_row(*(Text("-" if cell is None else str(cell)) for cell in row))
    if not laid_out.row_count:
        typer.echo(nothing)
        return
    screen = console()
    with screen.capture() as capture:
        screen.print(laid_out)
    # Cells are padded to their column's width, the last one too.
    typer.echo("\n".join(line.rstrip() for line in capture.get().splitlines()))


def size(size_bytes: int | None) -> str | None:
    """Return a size for a table's cell."""
    return None if size_bytes is None else format_size(size_bytes)


@contextmanager
def waiting(title: str) -> Iterator[None]:
    """Show a person that something goes on whose end nobody can tell."""
    if not sys.stdout.isatty():
        yield
        return
    from rich.text import Text

    with console().status(Text(title)):
        yield


@contextmanager
def progress(title: str) -> Iterator[Callable[[float], None]]:
    """Give a function to call with the part that is done, from 0 to 1."""
    if not sys.stdout.isatty():
        yield _plain(title)
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console(), transient=True) as bar:
        task = bar.add_task(title, total=1.0)
        yield lambda done: bar.update(task, completed=done)


def _plain(title: str) -> Callable[[float], None]:
    """A line now and then, for logs."""
    said, said_at = 0.0, time.monotonic()

    def say(done: float) -> None:
        nonlocal said, said_at
        now = time.monotonic()
        if done - said >= _PLAIN_STEP and now - said_at >= _PLAIN_PAUSE_S and done < 1.0:
            said, said_at = done, now
            typer.echo(f"{title}: {done:.0%}")

    return say
