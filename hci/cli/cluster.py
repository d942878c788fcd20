"""`hci cluster`: the cluster's records as a whole."""

import sys
from typing import Annotated, Any

import typer

from hci.cli import output, session
from hci.cli.output import AsJson
from vmstore.errors import RecoveryRefused
from vmstore.recovering import ImagePlan, Plan

app = typer.Typer(
    help="The cluster's records as a whole.", no_args_is_help=True, add_completion=False
)

DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done, do nothing.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


@app.callback()
def group() -> None:
    """Look after what etcd knows of the cluster."""


@app.command()
def recover(
    context: typer.Context,
    dry_run: DryRun = False,
    yes: Yes = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Also images of which too few nodes answer; it is shown what may be lost.",
        ),
    ] = False,
    node: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST:PORT", help="Control address of a node that nothing names."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Rebuild etcd's records from the nodes, after etcd was lost or put back to an older copy."""
    from hci import recover as hearing
    from vmstore.rebuilding import carry_out

    here = session.of(context)
    with here.catalog(may_be_empty=True) as records:
        with output.waiting("asking the nodes"):
            sources = hearing.hear(here.config, records.etcd, node or ())
        found = hearing.make_plan(sources)
        if as_json:
            output.as_json(_values(found))
        else:
            _show(found)
        if not found.needed:
            return
        if dry_run:
            return
        _refuse(found, force=force)
        if not yes and not _agreed(found):
            raise typer.Exit(1)
        carry_out(records.etcd, sources, found)
    if not as_json:
        typer.echo(f"recovery {found.recovery} is done; nodes and gateways go on by themselves")


@app.command()
def leftovers(
    context: typer.Context,
    images: Annotated[
        list[str] | None,
        typer.Argument(metavar="ID", help="Only these; unknown ones need it."),
    ] = None,
    collect: Annotated[
        bool, typer.Option("--collect", help="Delete them; without it they are only shown.")
    ] = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Show what is left of images that are gone or were never finished, or delete it."""
    from hci import leftovers as left

    here = session.of(context)
    with here.catalog() as records:
        found = left.find(here.config, records)
        if as_json:
            keys = ("kind", "image", "name", "nodes", "physical_bytes", "what", "collectable")
            output.as_json(
                {"leftovers": [{key: getattr(each, key) for key in keys} for each in found]}
            )
        else:
            output.table(
                ("KIND", "ID", "NAME", "NODES", "BYTES", "WHAT"),
                [
                    (
                        *(each.kind, each.image, each.name or None, ", ".join(each.nodes)),
                        *(output.size(each.physical_bytes), each.what),
                    )
                    for each in found
                ],
                "nothing is left over",
            )
        if not collect:
            return
        if not yes and not (
            sys.stdin.isatty() and typer.confirm("Delete these for ever, as far as they can be?")
        ):
            raise RecoveryRefused("nothing was deleted; confirm it with --yes")
        for each in left.collect(here.config, records, found, images or ()):
            typer.echo(f"collected {each.name or each.image}", err=as_json)


def _refuse(found: Plan, *, force: bool) -> None:
    if found.refusals:
        raise RecoveryRefused("; ".join(found.refusals))
    if found.missing and not force:
        images = "; ".join(f"{each.name}: {', '.join(each.missing)}" for each in found.missing)
        away = "; ".join(f"{name}: {why}" for name, why in found.away.items())
        raise RecoveryRefused(
            f"too little is known of {len(found.missing)} images ({images}). Bring the nodes back "
            f"({away or 'all that are known answer'}) and run this again, or see with --dry-run "
            "--force what may be lost, and force it"
        )


def _agreed(found: Plan) -> bool:
    if not sys.stdin.isatty():
        raise RecoveryRefused("this writes the cluster's records; confirm it with --yes")
    what = "with the losses shown above " if found.missing else ""
    return typer.confirm(f"Write this to etcd {what}now?")


def _show(found: Plan) -> None:
    if not found.needed:
        typer.echo("etcd agrees with all that the nodes know: nothing is to be recovered")
        for name, why in found.away.items():
            typer.echo(f"  {name} was not heard: {why}")
        return
    for why in found.why:
        typer.echo(f"etcd is behind: {why}")
    for name, why in found.away.items():
        typer.echo(f"not heard: {name}: {why}")
    typer.echo("")
    output.table(
        ("IMAGE", "ID", "ACTION", "HEARD", "KNOWN", "WRITTEN", "IN SYNC"),
        [
            (
                *(each.name, each.image[:8], each.action, ", ".join(each.heard) or None),
                *(_numbers(each.found), _numbers(each.written)),
                "; ".join(", ".join(nodes) for nodes in each.in_sync) or None,
            )
            for each in found.images
        ],
        "no images are known",
    )
    typer.echo("\nKNOWN and WRITTEN are epoch and generation")
    others = ", ".join(f"{count} {kind}" for kind, count in found.counts.items() if count)
    typer.echo(f"other records to write: {others or 'none'}")
    for each in found.missing:
        for why in each.missing:
            typer.echo(f"{each.name}: {why}")
        for loss in each.losses:
            typer.echo(f"{each.name}: --force loses {loss}")


def _numbers(pair: tuple[int, int] | None) -> str | None:
    return None if pair is None else f"{pair[0]}, {pair[1]}"


def _values(found: Plan) -> dict[str, Any]:
    return {
        "needed": found.needed,
        "why": list(found.why),
        "recovery": found.recovery,
        "images": [_image_values(each) for each in found.images],
        "written": dict(found.counts),
        "not_heard": dict(found.away),
        "refusals": list(found.refusals),
    }


def _image_values(each: ImagePlan) -> dict[str, Any]:
    def numbers(pair: tuple[int, int] | None) -> dict[str, int] | None:
        return None if pair is None else {"epoch": pair[0], "generation": pair[1]}

    return {
        "name": each.name,
        "id": each.image,
        "action": each.action,
        "heard": list(each.heard),
        "known": numbers(each.found),
        "written": numbers(each.written),
        "in_sync": [list(nodes) for nodes in each.in_sync],
        "missing": list(each.missing),
        "losses": list(each.losses),
    }
