"""`hci dev`: a whole cluster on this machine."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from hci import config_file
from hci.cli import output, session
from hci.cli.output import AsJson
from hci.dev import cluster, layout
from hci.dev.cluster import DevCluster
from hci.errors import ConfigError, DevError

app = typer.Typer(
    help="A cluster on this machine, for development.", no_args_is_help=True, add_completion=False
)

Who = Annotated[
    str, typer.Argument(metavar="MEMBER|all", help="etcd, node1, gateway1, arbiter, … or all.")
]

Folder = Annotated[
    Path | None,
    typer.Option("--dir", metavar="DIR", help="The cluster's folder, as `hci dev start` took it."),
]

SameFolder = Annotated[Path | None, typer.Argument(metavar="DIR", help="The same as --dir.")]


@app.command()
def start(
    context: typer.Context,
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="DIR", help="Where all is kept; by default in your data folder."),
    ] = None,
    directory: Annotated[
        Path | None, typer.Option("--dir", metavar="DIR", help="The same as DIR.")
    ] = None,
    nodes: Annotated[
        int | None,
        typer.Option(min=1, max=layout.MEMBERS_MAX, help=f"By default {cluster.NODES}."),
    ] = None,
    gateways: Annotated[
        int | None,
        typer.Option(min=1, max=layout.MEMBERS_MAX, help=f"By default {cluster.GATEWAYS}."),
    ] = None,
    arbiter: Annotated[
        bool,
        typer.Option("--arbiter", help="With a thin arbiter, for which two nodes do."),
    ] = False,
    pool: Annotated[
        str | None,
        typer.Option(help=f"Created with the cluster, by default {cluster.POOL}."),
    ] = None,
) -> None:
    """Start a cluster, a new one or one that was stopped; return when it is healthy."""
    chosen = (_one(folder, directory) or _folder(session.of(context).given)).absolute()
    found = cluster.open_or_make(chosen, nodes, gateways, pool, arbiter=arbiter)
    found.start()
    members = ", ".join(member.name for member in found.members)
    typer.echo(f"cluster in {chosen} is running: {members}")
    if not _is_found(found.config.path):
        path = shlex.quote(str(found.config.path))
        typer.echo(f"commands use it with:  export HCI_CONFIG={path}")


@app.command()
def stop(context: typer.Context, folder: SameFolder = None, directory: Folder = None) -> None:
    """Stop all members in good order."""
    found = _cluster(context, _one(folder, directory))
    killed = found.stop()
    typer.echo(f"cluster in {found.folder} is stopped")
    if killed:
        raise DevError(
            f"{', '.join(killed)} did not stop in {cluster.STOP_GRACE_S:.0f} s and had to be killed"
        )


@app.command()
def status(
    context: typer.Context,
    folder: SameFolder = None,
    directory: Folder = None,
    as_json: AsJson = False,
) -> None:
    """List the members and how they are."""
    found = _cluster(context, _one(folder, directory))
    states = found.states()
    if as_json:
        output.as_json({"dir": str(found.folder), "members": [_values(each) for each in states]})
        return
    output.table(
        ("NAME", "KIND", "STATE", "PID", "DATA", "LOG"),
        [tuple(_values(each).values()) for each in states],
        "no members",
    )


@app.command()
def kill(context: typer.Context, member: Who, directory: Folder = None) -> None:
    """Kill a member without warning (SIGKILL); nothing restarts it."""
    for killed in _cluster(context, directory).kill(member):
        typer.echo(f"killed {killed.name}")


@app.command()
def run(context: typer.Context, member: Who, directory: Folder = None) -> None:
    """Start a member that was killed or stopped; return when it is healthy."""
    for started in _cluster(context, directory).run(member):
        typer.echo(f"started {started.name}")


def _cluster(context: typer.Context, folder: Path | None) -> DevCluster:
    if folder is None:
        return DevCluster(session.of(context).config)
    path = folder.absolute() / layout.CONFIG_NAME
    if not path.exists():
        raise DevError(f"{folder} holds no cluster; `hci dev start {folder}` makes one there")
    return DevCluster(config_file.load(path))


def _one(folder: Path | None, directory: Path | None) -> Path | None:
    if folder is not None and directory is not None and folder != directory:
        raise DevError(f"{folder} and --dir {directory} are two folders; give one")
    return folder or directory


def _is_found(path: Path) -> bool:
    """Whether commands that are told nothing use this configuration."""
    try:
        return config_file.find().absolute() == path
    except ConfigError:
        return False


def _folder(given: Path | None) -> Path:
    """The folder of the configuration that was asked for by name, else the default."""
    if given is not None and given.name != layout.CONFIG_NAME:
        raise DevError(
            f"{given} is no configuration of a cluster that `hci dev` started, which is called "
            f"{layout.CONFIG_NAME}; give the cluster's folder instead"
        )
    try:
        path = config_file.find(given)
    except ConfigError:
        return config_file.default_dev_dir()
    is_default = path == config_file.SYSTEM_CONFIG or path.name != layout.CONFIG_NAME
    return config_file.default_dev_dir() if is_default else path.parent


def _values(each: cluster.MemberState) -> dict[str, object]:
    return {
        "name": each.member.name,
        "kind": each.member.kind,
        "state": each.state,
        "pid": each.pid,
        "data_dir": str(each.member.data_dir),
        "log": str(each.member.log),
    }
