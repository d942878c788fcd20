"""`hci node`: list storage nodes, be one."""

from collections.abc import Mapping
from typing import Annotated

import typer

from hci.cli import output, session
from hci.cli.output import AsJson
from hci.config import Config
from hci.errors import ConfigError, Unsupported

app = typer.Typer(help="Storage nodes.", no_args_is_help=True, add_completion=False)

Name = Annotated[
    str | None, typer.Option(help="Which section of the configuration; not needed if it has one.")
]


@app.command("ls")
def show(context: typer.Context, as_json: AsJson = False) -> None:
    """List the nodes."""
    from hci import survey

    nodes = survey.nodes(session.of(context).config)
    if as_json:
        keys = ("name", "state", "address", "zone", "data_dir", "capacity_bytes", "used_bytes",
                "unknown_bytes")  # fmt: skip
        output.as_json([{key: getattr(node, key) for key in keys} for node in nodes])
        return
    output.table(
        ("NAME", "STATE", "ADDRESS", "HOST", "ZONE", "USED", "UNKNOWN", "CAPACITY", "DATA"),
        [
            (
                *(node.name, node.state, node.address, node.host, node.zone),
                *(output.size(node.used_bytes), output.size(node.unknown_bytes or None)),
                *(output.size(node.capacity_bytes), node.data_dir),
            )
            for node in nodes
        ],
        "no nodes are registered",
    )


@app.command()
def serve(context: typer.Context, name: Name = None) -> None:
    """Be a storage node, until told to stop (SIGTERM)."""
    config = session.of(context).config
    chosen = only_or(config, "node", config.nodes, name)
    try:
        from hci.node import serve as serve_node
    except ImportError as error:
        raise Unsupported(f"this build has no storage node: {error}") from error
    serve_node(config, chosen)


def only_or(config: Config, kind: str, members: Mapping[str, object], name: str | None) -> str:
    """Return `name`, or that of the only member there is. Raises ConfigError."""
    if name is not None:
        return name
    if len(members) == 1:
        return next(iter(members))
    known = ", ".join(sorted(members)) or "none"
    raise ConfigError(f"say which {kind} with --name (known: {known})", config.path)
