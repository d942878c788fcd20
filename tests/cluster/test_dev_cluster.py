"""`hci dev`: a cluster of real processes, started, hurt, mended and stopped by the command line."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.devcluster import CommandError, DevCluster, hci_program


@pytest.fixture(scope="module")
def shared() -> Iterator[DevCluster]:
    with DevCluster() as started:
        yield started
    assert started.processes() == []


@pytest.fixture
def cluster(shared: DevCluster) -> DevCluster:
    """The cluster of this module, all of it running."""
    shared.hci("dev", "run", "all")
    return shared


def states(cluster: DevCluster) -> dict[str, str]:
    members = cluster.json("dev", "status")["members"]
    return {member["name"]: member["state"] for member in members}


def test_member_that_is_killed_is_dead_until_it_is_run_again(cluster: DevCluster) -> None:
    everything = {"etcd", "node1", "node2", "node3", "gateway1"}
    assert states(cluster) == dict.fromkeys(everything, "running")
    assert cluster.json("status")["health"] == "ok"

    cluster.hci("dev", "kill", "node2")
    assert states(cluster) == dict.fromkeys(everything, "running") | {"node2": "dead"}
    status = cluster.json("status")
    assert status["health"] == "degraded"
    assert status["problems"][0]["advice"] == "start it: `hci dev run node2`"
    with pytest.raises(CommandError, match="node2 is not running"):
        cluster.hci("dev", "kill", "node2")

    cluster.hci("dev", "run", "node2")
    assert cluster.json("status")["health"] == "ok"
    with pytest.raises(CommandError, match="node2 is already running"):
        cluster.hci("dev", "run", "node2")


def test_cluster_that_was_killed_whole_starts_again_with_its_images(cluster: DevCluster) -> None:
    cluster.hci("image", "create", "vms/killed", "1G")
    cluster.hci("dev", "kill", "all")
    assert set(states(cluster).values()) == {"dead"}
    with pytest.raises(CommandError, match="node1 needs etcd, which is not running"):
        cluster.hci("dev", "run", "node1")
    cluster.hci("dev", "run", "all")
    assert "vms/killed" in [image["name"] for image in cluster.json("image", "ls")]


def test_cluster_that_was_stopped_starts_again_in_its_folder(cluster: DevCluster) -> None:
    cluster.hci("image", "create", "vms/stopped", "1G")
    with pytest.raises(CommandError, match="already running"):
        cluster.hci("dev", "start", str(cluster.directory))
    cluster.hci("dev", "stop")
    assert set(states(cluster).values()) == {"stopped"}
    assert cluster.processes() == []
    elsewhere = cluster.environment()
    del elsewhere["HCI_CONFIG"]
    started = subprocess.run(
        cluster.command("dev", "start", "--dir", str(cluster.directory)),
        env=elsewhere,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"export HCI_CONFIG={cluster.config}" in started.stdout
    assert "vms/stopped" in [image["name"] for image in cluster.json("image", "ls")]


def test_port_in_use_is_named_and_nothing_is_left_running(cluster: DevCluster) -> None:
    address = cluster.json("node", "ls")[1]["address"]
    cluster.hci("dev", "stop")
    host, port = address.split(":")
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind((host, int(port)))
        other.listen()
        with pytest.raises(CommandError, match=f"node2 needs {address}, which another program"):
            cluster.hci("dev", "start", str(cluster.directory))
    assert cluster.processes() == []


def test_member_that_does_not_start_is_told_with_its_reason(cluster: DevCluster) -> None:
    cluster.hci("dev", "stop")
    store = cluster.directory / "node2"
    kept = store.rename(cluster.directory / "kept")
    store.write_text("in the way")
    with pytest.raises(
        CommandError, match=r"node2 ended with status 1: .*log/node2\.log\)"
    ) as said:
        cluster.hci("dev", "start", str(cluster.directory))
    store.unlink()
    kept.rename(store)
    assert "\n" not in str(said.value)
    assert cluster.processes() == []


@pytest.mark.parametrize("interrupts", [1, 20])
def test_start_that_is_interrupted_leaves_nothing_running(interrupts: int) -> None:
    # A second interrupt ended the stop of what the first one had left.
    with tempfile.TemporaryDirectory(prefix="hci-") as folder:
        command = [str(hci_program()), "dev", "start", folder]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        record = Path(folder) / "pid" / "node1.json"
        while not record.exists():
            assert process.poll() is None
            time.sleep(0.01)
        for _ in range(interrupts):
            process.send_signal(signal.SIGINT)
            time.sleep(0.02)
        assert process.wait(120) in (130, -signal.SIGINT)
        # A member's command line names the cluster's folder.
        left = subprocess.run(["pgrep", "-f", "--", f"{folder}/"], capture_output=True, text=True)
        assert left.stdout == ""


def test_cluster_in_a_deep_folder_has_short_sockets() -> None:
    with tempfile.TemporaryDirectory(prefix="hci-") as folder:
        deep = Path(folder) / ("deep-" * 20) / ("deeper-" * 20) / "with a space and ü"
        with DevCluster(directory=deep) as cluster:
            cluster.hci("image", "create", "vms/a", "64M")
            url = cluster.hci("image", "url", "vms/a").strip()
            shown = subprocess.run(["qemu-img", "info", url], capture_output=True, text=True)
            assert "64 MiB" in shown.stdout, shown.stderr
            cluster.hci("dev", "stop")
            elsewhere = cluster.environment()
            del elsewhere["HCI_CONFIG"]
            command = cluster.command("dev", "start", str(deep))
            started = subprocess.check_output(command, env=elsewhere, text=True)
            assert shlex.split(started)[-1] == f"HCI_CONFIG={cluster.config}", "it can be pasted"


def test_daemon_started_by_hand_stops_when_asked(cluster: DevCluster) -> None:
    """What a service manager does: `serve` in the foreground, SIGTERM to end it."""
    cluster.hci("dev", "kill", "node3")
    command = [sys.executable, "-m", "hci", "node", "serve", "--name", "node3"]
    environ = os.environ | {"HCI_CONFIG": str(cluster.config)}
    process = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL)
    try:
        for _ in range(600):
            if cluster.json("status")["health"] == "ok":
                break
            time.sleep(0.1)
        assert cluster.json("status")["health"] == "ok"
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
