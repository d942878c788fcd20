"""`hci heal`: how stale nodes become in sync again."""

import time
from collections.abc import Iterator
from typing import Any

import typer

from hci.cli import output, session
from hci.cli.output import AsJson
from hci.survey import Survey, survey
from shard.errors import HciError

app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.callback()
def group() -> None:
    """Heals: making stale nodes level, which happens by itself."""


@app.command()
def status(context: typer.Context, as_json: AsJson = False) -> None:
    """Show the heals under way, those that wait, and the last that are done."""
    found = survey(session.of(context).config)
    if found.etcd:
        # Who is stale stands there: that nothing is would be a guess.
        raise HciError(found.etcd)
    lines = [*_under_way(found), *_waiting(found), *_finished(found)]
    if as_json:
        output.as_json({"images": lines})
        return
    output.table(
        ("IMAGE", "NODE", "STATE", "DONE", "LEFT", "PER SECOND", "TIME LEFT"),
        [
            (
                line["image"],
                line["node"],
                line["state"],
                output.size(line["bytes_done"]),
                output.size(line["bytes_left"]),
                output.size(line["bytes_per_second"]),
                _when(line),
            )
            for line in lines
        ],
        "nothing is stale, and nothing was healed since the gateways started",
    )


def _when(line: dict[str, Any]) -> str | None:
    if line["finished_at"] is not None:
        return time.strftime("at %H:%M:%S", time.localtime(line["finished_at"]))
    return None if line["eta_s"] is None else f"{line['eta_s']} s"


def _under_way(found: Survey) -> Iterator[dict[str, Any]]:
    for gateway in found.gateways:
        for image in gateway.images:
            if image.HasField("heal"):
                heal = image.heal
                speed = heal.bytes_per_second
                yield {
                    "image": image.name,
                    "node": heal.node,
                    "state": "healing",
                    "bytes_done": heal.copied_bytes,
                    "bytes_left": heal.bytes_left,
                    "bytes_per_second": speed,
                    "eta_s": -(-heal.bytes_left // speed) if speed else None,
                    "finished_at": None,
                    "bad_blocks": heal.bad_blocks,
                }


def _waiting(found: Survey) -> Iterator[dict[str, Any]]:
    busy = {
        (image.name, image.heal.node)
        for gateway in found.gateways
        for image in gateway.images
        if image.HasField("heal")
    }
    for name, record in sorted(found.images.items()):
        for node in sorted({node for nodes in record.stale.values() for node in nodes}):
            if (name, node) not in busy:
                yield {
                    "image": name,
                    "node": node,
                    "state": "stale",
                    "bytes_done": 0,
                    "bytes_left": None,
                    "bytes_per_second": 0,
                    "eta_s": None,
                    "finished_at": None,
                    "bad_blocks": 0,
                }


def _finished(found: Survey) -> Iterator[dict[str, Any]]:
    finished = [heal for gateway in found.gateways for heal in gateway.finished_heals]
    for heal in sorted(finished, key=lambda heal: -heal.finished_at):
        yield {
            "image": heal.name,
            "node": heal.node,
            "state": "done",
            "bytes_done": heal.copied_bytes,
            "bytes_left": 0,
            "bytes_per_second": heal.bytes_per_second,
            "eta_s": 0,
            "finished_at": heal.finished_at,
            "bad_blocks": heal.bad_blocks,
        }
