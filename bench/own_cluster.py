"""A cluster that a measure has for itself, and its images as fio sees them."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from bench.fio import MeasurementError
from bench.processes import processes_naming
from tests.devcluster import CommandError, DevCluster

CLOSED_TIMEOUT_S = 60.0
GATEWAY = "gateway1"


def started(stack: contextlib.ExitStack, directory: Path) -> DevCluster:
    """Three nodes, a gateway and etcd in `directory`, which `stack` stops and removes."""
    cluster = DevCluster(directory=directory)
    stack.callback(cluster.close)
    cluster.start()
    return cluster


def target(cluster: DevCluster, image: str) -> list[str]:
    """What names an image to fio."""
    return ["--ioengine=nbd", f"--uri={cluster.url_at(GATEWAY, image)}"]


def pids(cluster: DevCluster) -> list[int]:
    """Every process of the cluster."""
    return processes_naming(cluster.directory)


def await_closed(cluster: DevCluster, image: str) -> None:
    """Returns when nobody has the image open any more; raises MeasurementError if never."""
    deadline = time.monotonic() + CLOSED_TIMEOUT_S
    while not cluster.info(image)["clean"]:
        if time.monotonic() > deadline:
            raise MeasurementError(f"{image} is not closed {CLOSED_TIMEOUT_S:.0f} s after its use")
        time.sleep(0.02)


def remove(cluster: DevCluster, image: str) -> None:
    """Deletes an image that was just left, which takes a moment to be closed."""
    await_closed(cluster, image)
    with contextlib.suppress(CommandError):  # it is in nobody's way if it stays
        cluster.remove(image)
