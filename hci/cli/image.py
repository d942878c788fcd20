"""`hci image`: create, list, look at, change, remove, import, export and check images."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from etcd.images import ImageRecord
from etcd.scrubs import ScrubRecord
from hci import changes, images, increments
from hci.cli import output, session
from hci.cli.output import AsJson
from shard import geometry
from vmstore import check as replicas
from vmstore import transfer
from vmstore.catalog import Catalog
from vmstore.names import ImageName, SnapshotName, parse_image_name, parse_name, parse_snapshot_name

app = typer.Typer(
    help="Images: virtual disks, named POOL/NAME.", no_args_is_help=True, add_completion=False
)

Image = Annotated[str, typer.Argument(metavar="POOL/NAME")]
Readable = Annotated[str, typer.Argument(metavar="POOL/NAME[@SNAPSHOT]")]
Size = Annotated[str, typer.Argument(help="As qemu-img takes it: 10G, 512M, 1.5T, bytes.")]
Format = Annotated[
    str | None, typer.Option("--format", help=f"One of {', '.join(transfer.FORMATS)}.")
]


@app.command()
def create(context: typer.Context, name: Image, size: Size) -> None:
    """Create an image. It takes space only where it is written."""
    size_bytes = geometry.parse_size(size)
    with session.of(context).catalog() as records:
        records.create_image(parse_image_name(name), size_bytes)
    typer.echo(f"created {name}, {geometry.format_size(size_bytes)}")


@app.command("ls")
def show(
    context: typer.Context,
    pool: Annotated[str | None, typer.Argument(metavar="POOL")] = None,
    as_json: AsJson = False,
) -> None:
    """List the images, of one pool or of all."""
    with session.of(context).catalog() as records:
        found = records.images(pool)
        leases = records.leases().items()
        holders = {image: lease.gateway for image, lease in leases if not lease.maintenance}
    rows = [
        (str(each.name), each.image.record, holders.get(each.image.record.id)) for each in found
    ]
    if as_json:
        output.as_json([_row(*row) for row in rows])
        return
    output.table(
        ("NAME", "SIZE", "OPEN ON", "STALE"),
        [
            (name, output.size(record.size_bytes), holder, _stale_words(record))
            for name, record, holder in rows
        ],
        "no images; create one with `hci image create POOL/NAME SIZE`",
    )


@app.command()
def info(context: typer.Context, name: Image, as_json: AsJson = False) -> None:
    """Say all that is known of an image."""
    here = session.of(context)
    with here.catalog() as records:
        record = records.find(parse_image_name(name)).record
        holder = images.holder_of(records, record.id)
        used = images.used_bytes(record, records.nodes())
        scrub = records.scrub_of(record.id)
    values = {**_row(name, record, holder), **_details(record, used), **_scrubbed(scrub)}
    if as_json:
        output.as_json(values)
        return
    values["snapshots"] = ", ".join(each.name for each in record.snapshots) or "-"
    values["merging"] = _merging_words(record)
    values["size_bytes"] = f"{record.size_bytes} ({geometry.format_size(record.size_bytes)})"
    values["used_bytes"] = ", ".join(f"{node} {output.size(used[node])}" for node in used) or "-"
    values["stale"] = _stale_words(record)
    bad = scrub.bad
    values["bad_blocks"] = ", ".join(f"{each.block} of shard {each.shard}" for each in bad) or "-"
    at_s = values["scrubbed_at"]
    values["scrubbed_at"] = time.ctime(at_s) if at_s else "-"
    values["replica_sets"] = "; ".join(", ".join(members) for members in record.sets)
    width = max(map(len, values))
    for key, value in values.items():
        typer.echo(f"{key:<{width}}  {'-' if value in (None, []) else value}")


def _scrubbed(scrub: ScrubRecord) -> dict[str, Any]:
    """Return what is known of damage that no replica can repair, and since when."""
    return {
        "scrubbed_at": scrub.finished_ms / 1000 or None,
        "bad_blocks": [
            {"shard": b.shard, "block": b.block, "blocks": b.blocks, "nodes": list(b.nodes)}
            for b in scrub.bad
        ],
    }


@app.command("rm")
def remove(
    context: typer.Context,
    name: Image,
    with_snapshots: Annotated[
        bool, typer.Option("--with-snapshots", help="Remove its snapshots too.")
    ] = False,
) -> None:
    """Remove an image and its data. It cannot be brought back."""
    here = session.of(context)
    with here.catalog() as records:
        images.remove(here.config, records, parse_image_name(name), with_snapshots=with_snapshots)
    typer.echo(f"removed {name}")


@app.command()
def resize(
    context: typer.Context,
    name: Image,
    size: Size,
    force: Annotated[
        bool, typer.Option("--force", help="Shrink, and lose what lies past the end.")
    ] = False,
    reconnect: Annotated[
        bool,
        typer.Option(
            "--reconnect",
            help="Have clients connect anew, between two requests, so that they see it: for QEMU "
            "with reconnect-delay. Then tell QEMU, by block_resize or `virsh blockresize`.",
        ),
    ] = False,
) -> None:
    """Change the size of an image; who has it open sees it after connecting anew."""
    here = session.of(context)
    size_bytes = geometry.parse_size(size)
    with here.catalog() as records, output.waiting(f"resizing {name}"):
        told_before = images.resize(
            here.config,
            records,
            parse_image_name(name),
            size_bytes,
            force=force,
            reconnect=reconnect,
        )
    typer.echo(f"{name} has {geometry.format_size(size_bytes)} now")
    if told_before:
        typer.echo(
            f"{told_before} connections do not see it until they connect anew; for QEMU with "
            "reconnect-delay, run this again with --reconnect",
            err=True,
        )


@app.command()
def url(
    context: typer.Context,
    name: Readable,
    gateway: Annotated[
        str | None, typer.Option(help="By default the one that has it open.")
    ] = None,
    tcp: Annotated[
        bool, typer.Option("--tcp", help="Over TCP rather than the unix socket.")
    ] = False,
) -> None:
    """Print the NBD URI of an image, or of a snapshot, which is there at every gateway."""
    here, image = session.of(context), parse_name(name)
    with here.catalog() as records:
        record = _found(records, image)
        if gateway is not None:
            section = here.config.gateway(gateway)
        else:
            section = images.gateway_for(here.config, images.holder_of(records, record.id))
    typer.echo(images.url(section, image, tcp=tcp))


@app.command("import")
def import_(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="A qcow2, raw, vmdk or vdi file.")],
    name: Annotated[str | None, typer.Argument(metavar="[POOL/NAME]")] = None,
    file_format: Format = None,
    onto: Annotated[
        str | None,
        typer.Option(
            "--onto",
            metavar="POOL/NAME",
            help="FILE is an increment: put it onto this image, which holds what it was made "
            "against, and take the snapshot that it is of.",
        ),
    ] = None,
) -> None:
    """Create an image with the content of a file, or put an increment onto one."""
    if (name is None) == (onto is None):
        raise typer.BadParameter("name the image to make, or with --onto the one that is there")
    here = session.of(context)
    if onto is not None:
        if file_format is not None:
            raise typer.BadParameter("an increment has one format")
        _import_onto(here, file, parse_image_name(onto))
        return
    assert name is not None
    image, source = parse_image_name(name), transfer.inspect(file, file_format)
    uri = images.answering_uri(here.config, image, None)
    with here.catalog() as records, output.progress(f"importing {file.name}") as progress:
        images.import_file(records, image, source, uri, progress)
    typer.echo(f"imported {file} as {name}, {geometry.format_size(source.size_bytes)}")


def _import_onto(here: session.Session, file: Path, onto: ImageName) -> None:
    with here.catalog() as records, output.progress(f"importing {file.name}") as progress:
        taken = increments.put_onto(here.config, records, file, onto, progress)
    typer.echo(f"imported {file}: {onto} holds what {taken.name} was, and has the snapshot {taken}")


@app.command()
def export(
    context: typer.Context,
    name: Readable,
    file: Annotated[Path, typer.Argument(help="Its suffix says the format, else --format.")],
    file_format: Format = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    since: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="SNAPSHOT",
            help="Of a snapshot, only what was written since this older one: an increment, for "
            "`hci image import --onto`.",
        ),
    ] = None,
) -> None:
    """Write the content of an image, or of a snapshot, into a file."""
    here, image = session.of(context), parse_name(name)
    if since is not None:
        if file_format is not None:
            raise typer.BadParameter("an increment has one format")
        if not isinstance(image, SnapshotName):
            raise typer.BadParameter("--from is for a snapshot: take one, and export that")
        base = SnapshotName(image.image, since)
        with here.catalog() as records, output.progress(f"exporting {name}") as progress:
            size = increments.export(here.config, records, base, image, file, progress, force=force)
        typer.echo(f"exported {geometry.format_size(size)} that {name} has since {since} to {file}")
        return
    with here.catalog() as records:
        holder = images.holder_of(records, _found(records, image).id)
    uri = images.answering_uri(here.config, image, holder)
    with output.progress(f"exporting {name}") as progress:
        transfer.export(uri, file, progress, file_format, force=force)
    typer.echo(f"exported {name} to {file}")


@app.command()
def diff(
    context: typer.Context,
    older: Annotated[str, typer.Argument(metavar="POOL/NAME@SNAPSHOT")],
    newer: Annotated[
        str | None, typer.Argument(metavar="POOL/NAME[@SNAPSHOT]", help="By default: now.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List what was written to an image since a snapshot: up to now, or to a later one."""
    here, since = session.of(context), parse_snapshot_name(older)
    upto = since.image if newer is None else parse_name(newer)
    with here.catalog() as records:
        if as_json:
            found = list(changes.since(here.config, records, since, upto, lambda _done: None))
        else:
            with output.progress(f"comparing {upto} with {since}") as progress:
                found = list(changes.since(here.config, records, since, upto, progress))
    rows = [
        (each.offset_bytes, each.length_bytes, "zero" if each.zero else "data") for each in found
    ]
    if as_json:
        keys = ("offset_bytes", "length_bytes", "type")
        output.as_json([dict(zip(keys, row, strict=True)) for row in rows])
        return
    output.table(("OFFSET", "LENGTH", "TYPE"), rows, f"nothing was written since {since}")
    if rows:
        data = sum(length for _, length, kind in rows if kind == "data")
        zeroes = sum(length for _, length, _ in rows) - data
        typer.echo(
            f"since {since} {geometry.format_size(data)} of data were written and "
            f"{geometry.format_size(zeroes)} zeroed, in {len(rows)} parts"
        )


def _found(records: Catalog, name: ImageName | SnapshotName) -> ImageRecord:
    """Return the record of an image, or of a snapshot's image. Raises what is not there."""
    if isinstance(name, SnapshotName):
        return records.find_snapshot(name)[0]
    return records.find(name).record


@app.command()
def check(context: typer.Context, name: Image, as_json: AsJson = False) -> None:
    """Compare the replicas of an image and its snapshots; exit status 1 where they differ or cannot
    be compared."""
    here, image = session.of(context), parse_image_name(name)
    with here.catalog() as records:
        if as_json:
            reports = images.check(here.config, records, image, lambda _done: None)
        else:
            with output.progress(f"comparing {name}") as progress:
                reports = images.check(here.config, records, image, progress)
    if as_json:
        output.as_json(_values_of(reports))
    else:
        for report in reports:
            of = f"{name}@{report.snapshot}" if report.snapshot else name
            for line in _report_lines(of, report):
                typer.echo(line)
    if not all(report.equal for report in reports):
        raise typer.Exit(1)


def _values_of(reports: list[replicas.Report]) -> dict[str, Any]:
    """Return what the image holds now, with its snapshots below it."""
    now, *rest = reports
    below = [{"name": report.snapshot, **_report_values(report)} for report in rest]
    equal = all(report.equal for report in reports)
    return {**_report_values(now), "equal": equal, "snapshots": below}


def _report_values(report: replicas.Report) -> dict[str, Any]:
    return {
        "equal": report.equal,
        "different": [
            {"shard": each.shard, "nodes": list(each.nodes), "unreadable": list(each.unreadable)}
            for each in report.different
        ],
        "compared": [list(nodes) for nodes in report.compared],
        "not_compared": list(report.not_compared),
        "missing": list(report.missing),
    }


def _report_lines(name: str, report: replicas.Report) -> Iterator[str]:
    for each in report.different:
        differing = [node for node in each.nodes if node not in each.unreadable]
        if differing:
            yield f"{name}: shard {each.shard} differs on {', '.join(differing)}"
        if each.unreadable:
            yield f"{name}: shard {each.shard} is damaged on {', '.join(each.unreadable)}"
    for index in report.not_compared:
        there = ", ".join(report.compared[index]) or "no node"
        yield (
            f"{name}: replica set {index} was not compared: of its nodes in sync {there} is up; "
            "start the others, then check again"
        )
    nodes = "; ".join(", ".join(members) for members in report.compared)
    if report.equal:
        yield f"{name}: the replicas in sync and up are equal ({nodes})"
    if report.missing:
        yield f"{name}: not compared, since not up: {', '.join(report.missing)}"


def _row(name: str, record: ImageRecord, holder: str | None) -> dict[str, Any]:
    return {
        "name": name,
        "id": record.id,
        "size_bytes": record.size_bytes,
        "open_on": holder,
        "epoch": record.epoch,
        "generation": record.generation,
        "stale": [
            {"replica_set": index, "node": node, "since_generation": since}
            for index, nodes in sorted(record.stale.items())
            for node, since in sorted(nodes.items())
        ],
    }


def _details(record: ImageRecord, used: dict[str, int]) -> dict[str, Any]:
    return {
        "pool": record.pool,
        "policy": record.policy,
        "shard_bytes": record.shard_bytes,
        "clean": record.clean,
        "replica_sets": [list(members) for members in record.sets],
        "snapshots": [
            {"name": s.name, "size_bytes": s.size_bytes, "created_at": s.created_s}
            for s in record.snapshots
        ],
        "merging": list(record.merging),
        "used_bytes": used,
    }


def _merging_words(record: ImageRecord) -> str | None:
    layers = ", ".join(map(str, record.merging))
    return f"layers {layers} of removed snapshots" if layers else None


def _stale_words(record: ImageRecord) -> str | None:
    nodes = sorted({node for since in record.stale.values() for node in since})
    return ", ".join(nodes) or None
