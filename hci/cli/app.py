"""The command's root: options that stand before every command, and the groups."""

from pathlib import Path
from typing import Annotated

import typer

from hci.cli import arbiter, dev, gateway, image, node, pool, status
from hci.cli.session import Session

app = typer.Typer(
    name="hci",
    help="Replicated block storage for virtual machines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("status")(status.show)
app.add_typer(image.app, name="image")
app.add_typer(pool.app, name="pool")
app.add_typer(node.app, name="node")
app.add_typer(gateway.app, name="gateway")
app.add_typer(arbiter.app, name="arbiter")
app.add_typer(dev.app, name="dev")


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
    context.obj = Session(config)
