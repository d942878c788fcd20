"""`hci pool`: create, change and list pools."""

from collections import Counter
from typing import Annotated

import typer

from hci.cli import output, session
from hci.cli.output import AsJson
from shard import geometry
from shard.membership import Policy, WhenFull
from shard.placement import FailureDomain

app = typer.Typer(
    help="Pools: policy for their images.", no_args_is_help=True, add_completion=False
)


@app.command()
def create(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Lower-case letters, digits and hyphens.")],
    policy: Annotated[Policy, typer.Option(help="How data is kept.")] = Policy.REPLICA_3,
    shard_size: Annotated[
        str, typer.Option(help="1M to 64M, a power of two; fixed from now on.")
    ] = "4M",
    replica_sets: Annotated[
        int | None,
        typer.Option(min=1, help="Groups of nodes to spread over; by default enough for all."),
    ] = None,
    failure_domain: Annotated[
        FailureDomain, typer.Option(help="What the copies of a shard must not share.")
    ] = FailureDomain.HOST,
    arbiter: Annotated[
        str | None,
        typer.Option(help="Which arbiter votes, with thin-arbiter; see `hci arbiter ls`."),
    ] = None,
    when_full: Annotated[
        WhenFull, typer.Option(help="What guests see where the disks of too many nodes are full.")
    ] = WhenFull.STALL,
) -> None:
    """Create a pool."""
    with session.of(context).catalog() as records:
        records.create_pool(
            name,
            policy=policy,
            shard_bytes=geometry.parse_size(shard_size),
            replica_sets=replica_sets,
            failure_domain=failure_domain,
            arbiter=arbiter,
            when_full=when_full,
        )
    typer.echo(f"created pool {name}")


@app.command("set")
def change(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Of a pool that exists.")],
    when_full: Annotated[
        WhenFull, typer.Option(help="What guests see where the disks of too many nodes are full.")
    ],
) -> None:
    """Change a pool; images that are open follow within seconds."""
    with session.of(context).catalog() as records:
        records.set_when_full(name, when_full)
    typer.echo(f"pool {name}: when full, {when_full}")


@app.command("ls")
def show(context: typer.Context, as_json: AsJson = False) -> None:
    """List the pools."""
    with session.of(context).catalog() as records:
        pools = sorted(records.pools().values(), key=lambda pool: pool.name)
        counts = Counter(entry.name.pool for entry in records.images())
    if as_json:
        output.as_json(
            [
                {
                    "name": pool.name,
                    "policy": pool.policy,
                    "shard_bytes": pool.shard_bytes,
                    "replica_sets": pool.replica_sets,
                    "failure_domain": pool.failure_domain,
                    "arbiter": pool.arbiter,
                    "when_full": pool.when_full,
                    "images": counts[pool.name],
                }
                for pool in pools
            ]
        )
        return
    output.table(
        (
            *("NAME", "POLICY", "SHARD", "REPLICA SETS", "FAILURE DOMAIN", "ARBITER"),
            *("WHEN FULL", "IMAGES"),
        ),
        [
            (
                *(pool.name, pool.policy, output.size(pool.shard_bytes)),
                *(pool.replica_sets, pool.failure_domain, pool.arbiter),
                *(pool.when_full, counts[pool.name]),
            )
            for pool in pools
        ],
        "no pools; create one with `hci pool create NAME`",
    )
