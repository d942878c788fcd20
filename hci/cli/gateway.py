"""`hci gateway`: list gateways, be one."""

import typer

from hci import survey
from hci.cli import output, session
from hci.cli.node import Name, only_or
from hci.cli.output import AsJson
from hci.errors import Unsupported

app = typer.Typer(help="Gateways.", no_args_is_help=True, add_completion=False)


@app.command("ls")
def show(context: typer.Context, as_json: AsJson = False) -> None:
    """List the gateways that run, on all hosts, and those of this host."""
    gateways = survey.gateways(session.of(context).config)
    if as_json:
        output.as_json(
            [
                {
                    "name": each.name,
                    "state": each.state,
                    "host": each.host,
                    "images": [image.name for image in each.images],
                    "trouble": each.trouble,
                }
                for each in gateways
            ]
        )
        return
    output.table(
        ("NAME", "STATE", "HOST", "OPEN IMAGES"),
        [(each.name, each.state, each.host, len(each.images)) for each in gateways],
        "no gateways run",
    )


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
