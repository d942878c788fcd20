"""`hci gateway`: be one."""

import typer

from hci.cli import session
from hci.cli.node import Name, only_or
from hci.errors import Unsupported

app = typer.Typer(help="Gateways.", no_args_is_help=True, add_completion=False)


@app.callback()
def _group() -> None:
    """Keeps `serve` a command of its own although it is the only one."""


@app.command()
def serve(context: typer.Context, name: Name = None) -> None:
    """Serve images over NBD, until told to stop (SIGTERM)."""
    config = session.of(context).config
    chosen = only_or(config, "gateway", config.gateways, name)
    try:
        from hci.gateway import serve as serve_gateway
    except ImportError as error:
        raise Unsupported(f"this build has no gateway: {error}") from error
    serve_gateway(config, chosen)
