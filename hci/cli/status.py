"""`hci status`: is all well, and if not, what to do."""

from collections.abc import Sequence
from typing import Any

import typer

from hci.cli import output, session
from hci.cli.output import AsJson
from hci.health import Problem, health_of, in_words, on_a_screen, problems
from hci.survey import Survey, survey

app = typer.Typer(add_completion=False)


@app.command()
def show(context: typer.Context, as_json: AsJson = False) -> None:
    """Say in one screen whether all is well and, if not, what to do."""
    config = session.of(context).config
    found = survey(config)
    judged = problems(found)
    if as_json:
        values = _values(found, judged)
        output.as_json({"health": health_of(judged), "cluster": config.cluster.id, **values})
        return
    console = output.console()
    console.print(f"Cluster {config.cluster.id} is {in_words(judged)}", style="bold")
    for problem in on_a_screen(judged):
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


def _values(found: Survey, judged: Sequence[Problem]) -> dict[str, Any]:
    return {
        "etcd": found.etcd or "ok",
        "problems": [
            {"health": each.health, "what": each.what, "advice": each.advice} for each in judged
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
