"""`hci arbiter`: list thin arbiters, be one, replace one."""

from typing import Annotated

import typer

from arbiter.client import ArbiterClient
from etcd.records import ArbiterRecord
from hci import survey
from hci.cli import output, session
from hci.cli.node import Name, only_or
from hci.cli.output import AsJson
from hci.errors import Unsupported
from vmstore import replacing
from vmstore.errors import ReplaceRefused

app = typer.Typer(
    help="Thin arbiters: witnesses for pools on two nodes.",
    no_args_is_help=True,
    add_completion=False,
)


@app.command("ls")
def show(context: typer.Context, as_json: AsJson = False) -> None:
    """List the arbiters."""
    arbiters = survey.arbiters(session.of(context).config)
    if as_json:
        keys = ("name", "state", "address", "host", "id", "pools", "images", "trouble")
        output.as_json([{key: getattr(each, key) for key in keys} for each in arbiters])
        return
    output.table(
        ("NAME", "STATE", "ADDRESS", "HOST", "POOLS", "IMAGES", "ID"),
        [
            (
                *(each.name, each.state, each.address, each.host),
                *(", ".join(each.pools) or None, each.images, each.id),
            )
            for each in arbiters
        ],
        "no arbiters are registered",
    )


@app.command()
def serve(context: typer.Context, name: Name = None) -> None:
    """Be a thin arbiter, until told to stop (SIGTERM)."""
    config = session.of(context).config
    chosen = only_or(config, "arbiter", config.arbiters, name)
    try:
        from hci.arbiter import serve as serve_arbiter
    except ImportError as error:
        raise Unsupported(f"this build has no arbiter: {error}") from error
    serve_arbiter(config, chosen)


@app.command()
def replace(
    context: typer.Context,
    old: Annotated[str, typer.Argument(help="The arbiter that goes; it need not run.")],
    new: Annotated[str, typer.Argument(help="The one that takes its place; it runs, empty.")],
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Also with a node missing or stale: if etcd was put back to an older copy, "
            "writes answered since then are lost.",
        ),
    ] = False,
) -> None:
    """Have another arbiter vote in place of one that is lost, filled from etcd."""
    clients: list[ArbiterClient] = []

    def voter(record: ArbiterRecord) -> ArbiterClient:
        client = ArbiterClient(record.name, record.address)
        clients.append(client)
        replacing.check_candidate(record, client.status())
        return client

    here = session.of(context)

    def up() -> set[str]:
        return {node.name for node in survey.nodes(here.config) if node.state == "up"}

    try:
        with here.catalog() as records:
            forced = _tell_loss if force else None
            done = replacing.replace_arbiter(records, old, new, voter, up=up, forced=forced)
    finally:
        for client in clients:
            client.close()
    pools = ", ".join(done.pools) or "no pool"
    typer.echo(f"{new} votes for {pools}, told of {done.images} images; {old} is retired")


def _tell_loss(refusal: ReplaceRefused) -> None:
    typer.echo(
        f"forced: {refusal.why}; what it alone knows of writes since etcd was last right is lost",
        err=True,
    )
