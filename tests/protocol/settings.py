"""A cluster whose gateway is run with other settings for a while."""

import contextlib
import json
import tomllib
import urllib.request
from collections.abc import Iterator, Mapping, Sequence

from tests.devcluster import DevCluster

GATEWAY = "gateway1"

Setting = bool | int | str | Sequence["Setting"] | Mapping[str, "Setting"]


@contextlib.contextmanager
def gateway_with(cluster: DevCluster, **settings: Setting) -> Iterator[None]:
    """Runs the gateway with these keys in its section; afterwards as it was before."""
    before = cluster.config.read_text()
    head, section, rest = before.partition(f"[gateway.{GATEWAY}]\n")
    assert section
    own, bracket, others = rest.partition("\n[")
    kept = [line for line in own.splitlines() if line.partition(" = ")[0] not in settings]
    lines = [*kept, *(f"{key} = {_toml(value)}" for key, value in settings.items())]
    _restart_with(cluster, head + section + "\n".join(lines) + "\n" + bracket + others)
    try:
        yield
    finally:
        _restart_with(cluster, before)


def _toml(value: Setting) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(inner) for inner in value) + "]"
    return json.dumps(value)


def _restart_with(cluster: DevCluster, config: str) -> None:
    cluster.kill(GATEWAY)
    cluster.config.write_text(config)
    cluster.run(GATEWAY)


def metric(cluster: DevCluster, member: str, name: str) -> float:
    """The sum of a metric of one member, over all its labels."""
    config = tomllib.loads(cluster.config.read_text())
    kind = member.rstrip("0123456789")
    address = config[kind][member]["metrics"]
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    values = [
        float(line.rsplit(" ", 1)[1])
        for line in lines
        if line.partition("{")[0].partition(" ")[0] == name
    ]
    assert values, f"{member} has no {name}"
    return sum(values)
