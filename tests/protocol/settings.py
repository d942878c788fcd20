"""A cluster whose gateway is run with other settings for a while."""

import contextlib
import json
import tomllib
import urllib.request
from collections.abc import Iterator

from tests.devcluster import DevCluster

GATEWAY = "gateway1"


@contextlib.contextmanager
def gateway_with(cluster: DevCluster, **settings: str | int | list[str]) -> Iterator[None]:
    """Runs the gateway with more keys in its section; afterwards as it was before."""
    before = cluster.config.read_text()
    lines = [f"{key} = {_toml(value)}" for key, value in settings.items()]
    section = f"[gateway.{GATEWAY}]\n"
    assert section in before
    _restart_with(cluster, before.replace(section, section + "\n".join(lines) + "\n"))
    try:
        yield
    finally:
        _restart_with(cluster, before)


def _toml(value: str | int | list[str]) -> str:
    return str(value) if isinstance(value, int) else json.dumps(value)


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
