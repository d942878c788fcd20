"""`hci snapshot`: take snapshots of images, list them, look at one, go back to one, remove them."""

import time
from typing import Annotated, Any

import typer

from etcd.images import ImageRecord, Snapshot
from hci import snapshots
from hci.cli import output, session
from hci.cli.output import AsJson
from shard.geometry import format_size
from vmstore.names import parse_snapshot_name

app = typer.Typer(no_args_is_help=True, add_completion=False)

Name = Annotated[str, typer.Argument(metavar="POOL/IMAGE@NAME")]


@app.callback()
def group() -> None:
    """Snapshots: what an image held at a moment, kept as it was. Read-only, at every gateway."""


@app.command()
def create(context: typer.Context, name: Name, as_json: AsJson = False) -> None:
    """Take a snapshot, of an image that is open too: writes wait for a moment."""
    here, wanted = session.of(context), parse_snapshot_name(name)
    with here.catalog() as records, output.waiting(f"taking {name}"):
        taken = snapshots.create(here.config, records, wanted)
    if as_json:
        output.as_json(
            {
                "name": name,
                "size_bytes": taken.size_bytes,
                "created_at": taken.created_s,
                "held_ms": taken.held_ms,
            }
        )
        return
    typer.echo(f"took {name}; writes waited {taken.held_ms} ms")


@app.command()
def rollback(
    context: typer.Context,
    name: Name,
    force: Annotated[
        bool, typer.Option("--force", help="Newer snapshots go too, with what they hold.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Have an image that nobody has open hold what its snapshot does; what was written since is
    gone."""
    here, wanted = session.of(context), parse_snapshot_name(name)
    with here.catalog() as records, output.waiting(f"going back to {name}"):
        done = snapshots.roll_back(here.config, records, wanted, force=force)
    if as_json:
        output.as_json(
            {
                "name": name,
                "created_at": done.created_s,
                "size_bytes": done.size_bytes,
                "former_size_bytes": done.former_bytes,
                "dropped": list(done.dropped),
            }
        )
        return
    typer.echo(
        f"{wanted.image} holds what it held at {time.ctime(done.created_s)}, and nothing that was "
        "written since"
    )
    if done.size_bytes != done.former_bytes:
        now, before = format_size(done.size_bytes), format_size(done.former_bytes)
        typer.echo(f"its size is {now} again, after {before}")
    if done.dropped:
        typer.echo(f"newer snapshots are gone: {', '.join(done.dropped)}")


@app.command("rm")
def remove(
    context: typer.Context,
    name: Name,
    wait: Annotated[
        bool, typer.Option("--wait", help="Until all nodes have freed what it alone kept.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Remove a snapshot, of an image that is open too. Its space comes back by and by."""
    here, wanted = session.of(context), parse_snapshot_name(name)
    with here.catalog() as records:
        with output.waiting(f"removing {name}"):
            image, layer = snapshots.remove(here.config, records, wanted)
        if wait:
            with output.waiting(f"merging what {name} held"):
                snapshots.await_merge(records, image, layer)
    if as_json:
        output.as_json({"name": name, "layer": layer, "merged": wait})
    elif wait:
        typer.echo(f"removed {name}, and freed what it alone kept")
    else:
        typer.echo(f"removed {name}; nodes free what it alone kept by and by")


@app.command("ls")
def show(
    context: typer.Context,
    where: Annotated[
        str | None, typer.Argument(metavar="POOL[/IMAGE]", help="Of which; default: all.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the snapshots of an image, of a pool or of all, the oldest first."""
    with session.of(context).catalog() as records:
        found = list(snapshots.listed(records, where))
        merging = [] if as_json else list(snapshots.merging(records, where))
    if as_json:
        output.as_json([_row(str(name), snapshot) for name, snapshot in found])
        return
    output.table(
        ("NAME", "SIZE", "CREATED"),
        [
            (name, output.size(snapshot.size_bytes), time.ctime(snapshot.created_s))
            for name, snapshot in found
        ],
        "no snapshots; take one with `hci snapshot create POOL/IMAGE@NAME`",
    )
    for image, count in merging:
        what = "a removed snapshot is" if count == 1 else f"{count} removed snapshots are"
        typer.echo(f"{image}: {what} being merged")


@app.command()
def info(context: typer.Context, name: Name, as_json: AsJson = False) -> None:
    """Say all that is known of a snapshot."""
    with session.of(context).catalog() as records:
        record, snapshot = records.find_snapshot(parse_snapshot_name(name))
        clones = [e.name for e in records.clones_of(record.id) if e.layer == snapshot.layer]
    values = {**_row(name, snapshot), **_details(record, snapshot), "clones": clones}
    if as_json:
        output.as_json(values)
        return
    values["size_bytes"] = f"{snapshot.size_bytes} ({format_size(snapshot.size_bytes)})"
    values["created_at"] = time.ctime(snapshot.created_s)
    values["layers"] = ", ".join(map(str, record.chain(snapshot)))
    values["clones"] = ", ".join(clones) or "-"
    width = max(map(len, values))
    for key, value in values.items():
        typer.echo(f"{key:<{width}}  {value}")


def _row(name: str, snapshot: Snapshot) -> dict[str, Any]:
    return {
        "name": name,
        "size_bytes": snapshot.size_bytes,
        "created_at": snapshot.created_s,
    }


def _details(record: ImageRecord, snapshot: Snapshot) -> dict[str, Any]:
    return {
        "image_id": record.id,
        "layers": record.chain(snapshot),
        "generation": snapshot.generation,
    }
