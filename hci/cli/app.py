"""The command's root: options that stand before every command, and what comes after them.

The module of a command is imported when that command is asked for: imports are most of the time
that `hci` takes, and none of them needs all.
"""

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from hci.cli import output
from hci.cli.session import Session

MODULES = (
    "status",
    "image",
    "snapshot",
    "pool",
    "node",
    "gateway",
    "arbiter",
    "heal",
    "scrub",
    "cluster",
    "dev",
)
"""Of this package, each with an `app`: a command or a group of them, called as its module is."""


class OnDemand(TyperGroup):
    """The commands of MODULES."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 - the base has it
        """Return the names of all commands, for help."""
        return list(MODULES)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command, or None. An unknown name has all imported: one of them may be meant."""
        for name in (cmd_name,) if cmd_name in MODULES else MODULES:
            if name not in self.commands:
                command = get_command(import_module(f"hci.cli.{name}").app)
                command.name = name
                _plain(command)
                self.add_command(command)
        return super().get_command(ctx, cmd_name)


def _plain(command: Any) -> None:
    """Have help told without frames, in which a switch looks as if it took a value."""
    command.rich_markup_mode = None
    for each in getattr(command, "commands", {}).values():
        _plain(each)


app = typer.Typer(
    name="hci",
    cls=OnDemand,
    help="Replicated block storage for virtual machines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(asked: bool) -> None:
    if asked:
        from engine import VERSION

        typer.echo(f"hci {VERSION}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(
            help="Which cluster; else HCI_CONFIG, /etc/hci/hci.toml, the default dev cluster.",
            metavar="FILE",
        ),
    ] = None,
    _version_asked: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = False,
) -> None:
    """Look after images, pools, nodes and gateways."""
    output.never_fail()
    context.obj = Session(config)
