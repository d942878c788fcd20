"""`hci status`: is all well, and if not, what to do."""

from typing import Any

import typer

from hci.cli import output, session
from hci.cli.output import AsJson
from hci.survey import Health, Survey, survey

app = typer.Typer(add_completion=False)


@app.command()
def show(context: typer.Context, as_json: AsJson = False) -> None:
    """Say in one screen whether all is well and, if not, what to do."""
    config = session.of(context).config
    found = survey(config)
    if as_json:
        output.as_json({"health": found.health, "cluster": config.cluster.id, **_values(found)})
        return
    console = output.console()
    console.print(f"Cluster {config.cluster.id} is {_WORDS[found.health]}", style="bold")
    for problem in found.problems:
        console.print(f"  {problem.what}\n    -> {problem.advice}")
    console.print()
    output.table(
        ("MEMBER", "STATE", "HOST", "USED", "CAPACITY", "IMAGES"),
        [
            *(
                (
                    n.name,
                    n.state,
                    n.host,
                    output.size(n.used_bytes),
                    output.size(n.capacity_bytes),
                    "",
                )
                for n in found.nodes
            ),
            *((g.name, g.state, g.host, "", "", f"{len(g.images)} open") for g in found.gateways),
            *((a.name, a.state, a.host, "", "", "arbiter") for a in found.arbiters),
        ],
        "no nodes are registered",
    )
    console.print(f"\n{len(found.pools)} pools, {len(found.images)} images")


_WORDS = {
    Health.OK: "well",
    Health.HEALING: "healing: it will be well by itself",
    Health.DEGRADED: "degraded: all images are served, with fewer copies than there should be",
    Health.UNAVAILABLE: "unavailable",
}


def _values(found: Survey) -> dict[str, Any]:
    return {
        "etcd": found.etcd or "ok",
        "problems": [
            {"health": each.health, "what": each.what, "advice": each.advice}
            for each in found.problems
        ],
        "nodes": [{"name": node.name, "state": node.state} for node in found.nodes],
        "gateways": [
            {
                "name": gateway.name,
                "state": gateway.state,
                "images": [image.name for image in gateway.images],
            }
            for gateway in found.gateways
        ],
        "arbiters": [{"name": each.name, "state": each.state} for each in found.arbiters],
        "pools": len(found.pools),
        "images": len(found.images),
    }
