"""`hci scrub`: reading everything, to find what has rotted before it is needed."""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import typer

from etcd.scrubs import Findings, ScrubRecord
from hci.cli import output, session
from hci.cli.output import AsJson
from hci.errors import ScrubFailed
from hci.survey import Survey, survey
from shard.ids import ImageId
from vmstore.catalog import Catalog
from vmstore.errors import UnknownImage
from vmstore.names import parse_image_name

app = typer.Typer(no_args_is_help=True, add_completion=False)

Images = Annotated[
    list[str] | None, typer.Argument(metavar="POOL/IMAGE", help="Which images; default: all.")
]

_POLL_S = 0.5


@app.callback()
def group() -> None:
    """Scrubs: reading all replicas and comparing them, which happens by itself now and then."""


@app.command()
def start(
    context: typer.Context,
    names: Images = None,
    wait: Annotated[bool, typer.Option("--wait", help="Return when they are through.")] = False,
) -> None:
    """Have images scrubbed now, one after the other on each gateway."""
    here = session.of(context)
    with here.catalog() as records:
        chosen = _choose(records, names)
        for image in chosen:
            records.ask_for_scrub(image, _now_ms())
        if not chosen:
            typer.echo("there are no images")
        elif not wait:
            typer.echo(f"asked for {_count(len(chosen))}; `hci scrub status` tells how far it is")
        else:
            found = _wait(context, records, chosen)
            _say(found)
            if any(findings.unrepairable or findings.undecided for findings in found.values()):
                raise typer.Exit(1)


@app.command()
def stop(context: typer.Context, names: Images = None) -> None:
    """End scrubs, those that were asked for and those under way."""
    with session.of(context).catalog() as records:
        chosen = _choose(records, names)
        stopped = [name for image, name in chosen.items() if records.stop_scrub(image, _now_ms())]
    typer.echo(f"stopped {', '.join(sorted(stopped))}" if stopped else "nothing was under way")


@app.command()
def status(context: typer.Context, names: Images = None, as_json: AsJson = False) -> None:
    """Show the scrubs under way, those that wait, and what the last ones found."""
    here = session.of(context)
    with here.catalog() as records:
        chosen = _choose(records, names)
        known = {image: item.record for image, item in records.scrubs().items()}
    found = survey(here.config)
    lines = [_line(found, name, known.get(image)) for image, name in chosen.items()]
    if as_json:
        output.as_json({"images": lines})
        return
    output.table(
        ("IMAGE", "STATE", "DONE", "READ", "FOUND", "REPAIRED", "BAD", "DIFFER", "LAST"),
        [
            (
                line["image"],
                line["state"],
                "-" if line["done"] is None else f"{line['done']:.0%}",
                output.size(line["read_bytes"]),
                line["found"],
                line["repaired"],
                line["unrepairable"],
                line["undecided"],
                _when(line["finished_at"]),
            )
            for line in lines
        ],
        "there are no images",
    )
    for line in lines:
        for bad in line["bad"]:
            typer.echo(f"{line['image']}: {_words(bad)}")


def _choose(records: Catalog, names: Sequence[str] | None) -> dict[ImageId, str]:
    """Return {image: name}, in the order asked for. Raises UnknownImage, BadValue."""
    every = {str(entry.name): entry.image.record.id for entry in records.images()}
    if not names:
        return {image: name for name, image in every.items()}
    for name in names:
        if str(parse_image_name(name)) not in every:
            raise UnknownImage(name)
    return {every[name]: name for name in names}


def _line(found: Survey, name: str, record: ScrubRecord | None) -> dict[str, Any]:
    live = _live(found, name)
    if record is None:
        record = ScrubRecord(image=ImageId("0" * 32))
    times = record.times
    if times.is_asked:
        state = "waits"
    elif times.is_under_way:
        state = "scrubbing" if live else "paused"
    else:
        state = "done" if times.finished_ms else "never"
    under_way = times.is_under_way and not times.is_asked
    findings = record.now if under_way else record.last
    more = live if under_way else {}
    return {
        "image": name,
        "state": state,
        "done": _part_done(record, live) if under_way else None,
        "read_bytes": max(findings.read_bytes, more.get("scrub_read_bytes", 0)),
        "found": max(findings.found, more.get("scrub_found", 0)),
        "repaired": max(findings.repaired, more.get("scrub_repaired", 0)),
        "unrepairable": findings.unrepairable,
        "undecided": findings.undecided,
        "bad": [
            {"shard": b.shard, "block": b.block, "blocks": b.blocks, "nodes": list(b.nodes)}
            for b in record.bad
        ],
        "missed": list(findings.missed),
        "begun_at": record.begun_ms / 1000 or None,
        "finished_at": record.finished_ms / 1000 or None,
    }


def _live(found: Survey, name: str) -> Mapping[str, int]:
    """Return what a gateway says of the scrub that it is at."""
    for gateway in found.gateways:
        for image in gateway.images:
            if image.name == name and "scrub_shards_left" in image.counters:
                return dict(image.counters)
    return {}


def _part_done(record: ScrubRecord, live: Mapping[str, int]) -> float | None:
    if not live:
        return None
    done = record.shards_done + live["scrub_shards_done"]
    everything = done + live["scrub_shards_left"]
    return done / everything if everything else None


def _wait(
    context: typer.Context, records: Catalog, chosen: Mapping[ImageId, str]
) -> dict[str, Findings]:
    """Wait until no scrub of these images is due or under way. Raises ScrubFailed if one ends."""
    config = session.of(context).config
    begun_ms = {image: records.scrub_of(image) for image in chosen}
    with output.progress(f"scrubbing {_count(len(chosen))}") as tell:
        while True:
            now = {image: records.scrub_of(image) for image in chosen}
            for image, record in now.items():
                if record.stopped_ms > begun_ms[image].stopped_ms:
                    raise ScrubFailed(chosen[image], "somebody stopped it")
            waiting = [i for i, r in now.items() if r.times.is_asked or r.times.is_under_way]
            if not waiting:
                tell(1.0)
                return {chosen[image]: record.last for image, record in now.items()}
            found = survey(config)
            parts = [
                _part_done(now[image], _live(found, chosen[image])) or 0.0 for image in waiting
            ]
            tell((len(chosen) - len(waiting) + sum(parts)) / len(chosen))
            time.sleep(_POLL_S)


def _say(found: Mapping[str, Findings]) -> None:
    for name, findings in found.items():
        words = [
            f"{findings.found} blocks damaged, {findings.repaired} repaired"
            if findings.found
            else "nothing damaged"
        ]
        if findings.missed:
            words.append(f"not read where it was away: {', '.join(findings.missed)}")
        typer.echo(f"{name}: read {output.size(findings.read_bytes)}, {'; '.join(words)}")
        for line in _bad_lines(findings):
            typer.echo(f"{name}: {line}")


def _bad_lines(findings: Findings) -> Iterator[str]:
    for bad in findings.bad:
        yield _words(
            {"shard": bad.shard, "block": bad.block, "blocks": bad.blocks, "nodes": bad.nodes}
        )


def _words(bad: Mapping[str, Any]) -> str:
    last = bad["block"] + bad["blocks"] - 1
    blocks = f"block {bad['block']}" if last == bad["block"] else f"blocks {bad['block']}-{last}"
    where = f"shard {bad['shard']}, {blocks}"
    if bad["nodes"]:
        return f"{where}: {', '.join(bad['nodes'])} differ, and nothing says which is right"
    return f"{where}: damaged on every node; readable again once written as a whole"


def _when(seconds: float | None) -> str | None:
    return None if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _count(images: int) -> str:
    return "1 image" if images == 1 else f"{images} images"


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
