"""A cluster that a measure has for itself, and its images as fio sees them."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from bench.fio import MeasurementError
from bench.processes import processes_naming
from tests.devcluster import DevCluster

CLOSED_TIMEOUT_S = 60.0
GONE_TIMEOUT_S = 180.0
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
    """Deletes an image that was just left; returns when all nodes have removed its files.

    Of an image with many shards that goes on long after it is deleted, beside what is measured
    next.
    """
    await_closed(cluster, image)
    image_id = cluster.info(image)["id"]
    cluster.remove(image)
    members = cluster.members()
    folders = [Path(members[node]["data_dir"]) / "images" / image_id for node in cluster.nodes]
    deadline = time.monotonic() + GONE_TIMEOUT_S
    while any(folder.exists() for folder in folders):
        if time.monotonic() > deadline:
            raise MeasurementError(f"{image} has files {GONE_TIMEOUT_S:.0f} s after its deletion")
        time.sleep(0.1)
