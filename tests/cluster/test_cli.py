"""Every command on a running cluster: what it prints for programs, and how it refuses.

A refusal is one line on stderr and exit status 1, wrong usage is 2, and nothing is half done.
"""

from __future__ import annotations

import json
import socket
import subprocess
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.devcluster import POOL, DevCluster
from tests.faults.nbd_session import NbdSession


@pytest.fixture(scope="module")
def shared(shared: DevCluster) -> DevCluster:
    """One cluster for all tests of this module that leave it healthy, with one image in it."""
    shared.create("there", "64M")
    return shared


@pytest.fixture
def stopped() -> Iterator[DevCluster]:
    """A cluster that was started and stopped again."""
    made = DevCluster()
    try:
        made.start()
        made.hci("dev", "stop")
        yield made
    finally:
        made.close()


def refused(cluster: DevCluster, *arguments: str) -> str:
    """Runs a command that must be refused in one line; returns the line."""
    done = cluster.try_hci(*arguments)
    assert done.returncode == 1, (arguments, done)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, (arguments, done.stderr)
    assert "Traceback" not in done.stderr
    return lines[0]


# What every listing promises.


def test_status_of_a_well_cluster_is_ok(shared: DevCluster) -> None:
    assert shared.json("status")["health"] == "ok"
    assert len(shared.hci("status").splitlines()) < 25, "more than one screen"


def test_dev_status_lists_every_member(shared: DevCluster) -> None:
    members = shared.members()
    assert set(members) == {"etcd", "node1", "node2", "node3", "gateway1"}
    for member in members.values():
        assert member["state"] == "running"
        assert Path(f"/proc/{member['pid']}").exists()
        assert Path(member["data_dir"]).is_dir()
        assert Path(member["log"]).is_file()
        assert member["kind"] in member["name"]


def test_node_ls_lists_every_node(shared: DevCluster) -> None:
    nodes = shared.json("node", "ls")
    assert [node["name"] for node in nodes] == shared.nodes
    for node in nodes:
        assert node["state"] == "up"
        assert node["address"].startswith("127.0.0.1:")
        assert node["zone"] == "default"
        assert Path(node["data_dir"]).is_dir()
        assert 0 <= node["used_bytes"] < node["capacity_bytes"]
    assert "node1" in shared.hci("node", "ls")


def test_pool_created_is_listed(shared: DevCluster) -> None:
    arguments = ("--policy", "replica-3", "--shard-size", "8M", "--replica-sets", "2")
    shared.hci("pool", "create", "second", *arguments)
    pools = {pool["name"]: pool for pool in shared.json("pool", "ls")}
    assert set(pools) >= {POOL, "second"}
    assert pools["second"]["policy"] == "replica-3"
    assert pools["second"]["shard_bytes"] == 8 << 20
    shared.hci("image", "create", "second/disk", "100M")
    with NbdSession(f"{shared.url('there').replace(f'{POOL}/there', 'second/disk')}", 1) as session:
        session.call("write", 0, 100, 1)
    assert shared.json("image", "check", "second/disk")["equal"]


def test_image_created_is_listed_and_described(shared: DevCluster) -> None:
    shared.create("seen", "10M")
    assert f"{POOL}/seen" in [image["name"] for image in shared.json("image", "ls")]
    assert f"{POOL}/seen" in shared.hci("image", "ls")
    info = shared.info("seen")
    assert info["size_bytes"] == 10 << 20
    assert len(bytes.fromhex(info["id"])) == 16
    assert info["stale"] == []
    assert set(info["used_bytes"]) <= set(shared.nodes)
    assert info["epoch"] >= 0
    assert info["generation"] >= 0
    assert f"{POOL}/seen" in shared.hci("image", "info", f"{POOL}/seen")


def test_image_url_is_an_nbd_uri_that_opens(shared: DevCluster) -> None:
    uri = shared.url("there")
    assert uri.startswith(f"nbd+unix:///{POOL}/there?socket=/")
    done = subprocess.run(["nbdinfo", "--size", uri], capture_output=True, text=True, timeout=30)
    assert done.stdout.strip() == str(64 << 20)


def test_image_with_a_name_in_utf8_is_served(shared: DevCluster) -> None:
    name = "Räume/büro 1/система%20.raw"
    shared.create(name, "1M")
    with NbdSession(shared.url(name), 1) as session:
        session.call("write", 0, 1, 1)
    assert shared.info(name)["size_bytes"] == 1 << 20
    shared.remove(name)
    assert f"{POOL}/{name}" not in [image["name"] for image in shared.json("image", "ls")]


def test_removed_image_is_gone_and_its_name_free(shared: DevCluster) -> None:
    shared.create("brief", "8M")
    first = shared.info("brief")["id"]
    with NbdSession(shared.url("brief"), 1) as session:
        session.call("write", 0, 16, 1)
    shared.remove("brief")
    assert "brief" in refused(shared, "image", "info", f"{POOL}/brief")
    shared.create("brief", "8M")
    assert shared.info("brief")["id"] != first
    with NbdSession(shared.url("brief"), 1) as session:
        assert session.call("read", 0, 16) == [0] * 16


def test_image_grown_keeps_its_content_and_reads_zero_beyond(shared: DevCluster) -> None:
    shared.create("grown", "8M")
    with NbdSession(shared.url("grown"), 1) as session:
        session.call("write", 2032, 16, 1)
    shared.hci("image", "resize", f"{POOL}/grown", "20M")
    assert shared.info("grown")["size_bytes"] == 20 << 20
    with NbdSession(shared.url("grown"), 1) as session:
        assert session.blocks == 5120
        assert session.call("read", 2032, 32) == [1] * 16 + [0] * 16
        session.call("write", 5104, 16, 2)


def test_image_shrunk_by_force_and_grown_again_reads_zero_there(shared: DevCluster) -> None:
    shared.create("cut", "16M")
    with NbdSession(shared.url("cut"), 1) as session:
        session.call("write", 0, 4096, 1)
    assert "--force" in refused(shared, "image", "resize", f"{POOL}/cut", "6M")
    assert shared.info("cut")["size_bytes"] == 16 << 20
    shared.hci("image", "resize", f"{POOL}/cut", "6M", "--force")
    shared.hci("image", "resize", f"{POOL}/cut", "16M")
    with NbdSession(shared.url("cut"), 1) as session:
        assert session.call("read", 0, 1536) == [1] * 1536
        assert session.call("read", 1536, 1024) == [0] * 1024


@pytest.mark.parametrize("size", ["512", "1k", "1.5M", "3G", "256T"])
def test_size_as_qemu_img_takes_it_is_taken(shared: DevCluster, size: str) -> None:
    shared.create("sized", size)
    try:
        done = subprocess.run(
            ["nbdinfo", "--size", shared.url("sized")], capture_output=True, text=True, timeout=30
        )
        assert int(done.stdout) == shared.info("sized")["size_bytes"]
    finally:
        shared.remove("sized")


# What is refused.


def test_size_that_is_no_size_is_refused_and_creates_nothing(shared: DevCluster) -> None:
    for size in ("0", "abc", "1000", "257T", "1Q", "", "9" * 30 + "T"):
        refused(shared, "image", "create", f"{POOL}/never", size)
    assert "never" in refused(shared, "image", "info", f"{POOL}/never")


# The rules themselves are tested where they are decided; here, that the command asks them.
@pytest.mark.parametrize(
    "name", ["vms", "vms/", "vms/a/../b", "vms/a@b", "Upper/disk", "vms/" + "c" * 256]
)
def test_image_name_that_breaks_the_rules_is_refused(shared: DevCluster, name: str) -> None:
    refused(shared, "image", "create", name, "1M")


@pytest.mark.parametrize(
    "arguments",
    [
        ("image", "info", "vms/nothing", "--json"),
        ("image", "info", "vms/nothing"),
        ("image", "rm", "vms/nothing"),
        ("image", "resize", "vms/nothing", "1G"),
        ("image", "url", "vms/nothing"),
        ("image", "check", "vms/nothing"),
        ("image", "export", "vms/nothing", "/tmp/hci-never-written.raw"),
        ("image", "create", "nopool/disk", "1M"),
        ("image", "ls", "nopool"),
    ],
)
def test_unknown_image_or_pool_is_refused_by_name(
    shared: DevCluster, arguments: tuple[str, ...]
) -> None:
    named = (
        "there is no pool nopool; `hci pool ls` lists what there is"
        if any("nopool" in each for each in arguments)
        else "there is no image vms/nothing; `hci image ls` lists what there is"
    )
    assert refused(shared, *arguments) == f"hci: {named}"
    assert not Path("/tmp/hci-never-written.raw").exists()


def test_name_that_exists_is_refused_and_the_image_stays(
    shared: DevCluster, tmp_path: Path
) -> None:
    before = shared.info("there")
    assert "there" in refused(shared, "image", "create", f"{POOL}/there", "1M")
    source = tmp_path / "source.raw"
    source.write_bytes(b"x" * 4096)
    assert "there" in refused(shared, "image", "import", str(source), f"{POOL}/there")
    assert shared.info("there") == before
    assert POOL in refused(shared, "pool", "create", POOL, "--policy", "replica-3")


def test_import_of_a_missing_file_is_refused(shared: DevCluster, tmp_path: Path) -> None:
    missing = tmp_path / "missing.qcow2"
    assert "missing.qcow2" in refused(shared, "image", "import", str(missing), f"{POOL}/never")
    empty = tmp_path / "empty.raw"
    empty.touch()
    refused(shared, "image", "import", str(empty), f"{POOL}/never")
    refused(shared, "image", "import", str(tmp_path), f"{POOL}/never")
    refused(shared, "image", "info", f"{POOL}/never")


def test_pool_that_cannot_be_is_refused_and_not_created(shared: DevCluster) -> None:
    before = shared.json("pool", "ls")
    for arguments in (
        ("Bad_Name",),
        ("a" * 64,),
        ("odd", "--shard-size", "3M"),
        ("tiny", "--shard-size", "512k"),
        ("huge", "--shard-size", "128M"),
        ("witness", "--policy", "thin-arbiter"),
    ):
        refused(shared, "pool", "create", *arguments)
    assert shared.json("pool", "ls") == before


def test_open_image_is_not_removed_and_its_guest_not_disturbed(shared: DevCluster) -> None:
    shared.create("busy", "8M")
    with NbdSession(shared.url("busy"), 1) as session:
        session.call("write", 0, 16, 1)
        assert "gateway1" in refused(shared, "image", "rm", f"{POOL}/busy")
        assert session.call("read", 0, 16) == [1] * 16
        session.call("write", 0, 16, 2)
    assert shared.info("busy")["size_bytes"] == 8 << 20


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("nonsense",),
        ("image",),
        ("image", "create"),
        ("image", "create", "vms/x"),
        ("image", "create", "vms/x", "1M", "2M"),
        ("image", "info", "--nonsense", "vms/there"),
        ("pool", "create", "x", "--policy", "nonsense"),
        ("dev", "kill"),
        ("dev", "start", "--nodes", "many"),
    ],
)
def test_wrong_usage_exits_with_2(shared: DevCluster, arguments: tuple[str, ...]) -> None:
    assert shared.try_hci(*arguments).returncode == 2


def test_member_that_is_not_there_is_refused(shared: DevCluster) -> None:
    assert "node9" in refused(shared, "dev", "kill", "node9")
    assert "node9" in refused(shared, "dev", "run", "node9")
    assert "running" in refused(shared, "dev", "run", "node1")
    assert "running" in refused(shared, "dev", "start", str(shared.directory))


def test_config_with_an_unknown_key_is_refused(shared: DevCluster, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.toml"
    text = shared.config.read_text()
    wrong.write_text(text.replace("[node.node1]\n", '[node.node1]\ncolour = "red"\n'))
    assert "colour" in refused(shared, "--config", str(wrong), "image", "ls")
    wrong.write_text("this is no TOML")
    assert "wrong.toml" in refused(shared, "--config", str(wrong), "image", "ls")
    assert "absent.toml" in refused(shared, "--config", str(tmp_path / "absent.toml"), "status")


# What stops or changes the cluster has one of its own.


def test_too_few_nodes_for_the_policy_is_refused_and_leaves_nothing_running() -> None:
    made = DevCluster(nodes=2)
    try:
        line = refused(made, "dev", "start", str(made.directory), "--nodes", "2")
        assert "3" in line
        assert made.processes() == []
    finally:
        made.close()


def test_port_in_use_is_refused_by_number_and_leaves_nothing_running(stopped: DevCluster) -> None:
    config = tomllib.loads(stopped.config.read_text())
    port = int(config["node"]["node2"]["listen"].rpartition(":")[2])
    with socket.create_server(("127.0.0.1", port)):
        assert str(port) in refused(stopped, "dev", "start", str(stopped.directory))
        assert stopped.processes() == []
    stopped.start()
    assert stopped.health() == "ok"


def test_node_with_a_disk_of_another_cluster_is_refused(stopped: DevCluster) -> None:
    with DevCluster() as other:
        other.hci("dev", "stop")
        config = tomllib.loads(stopped.config.read_text())
        foreign = tomllib.loads(other.config.read_text())
        mine = Path(config["node"]["node1"]["data_dir"])
        mine.rename(mine.with_name("kept"))
        Path(foreign["node"]["node1"]["data_dir"]).rename(mine)
        line = refused(stopped, "dev", "start", str(stopped.directory))
        theirs = foreign["cluster"]["id"]
        assert (
            f"node1 cannot use {mine}: the store belongs to node node1 of cluster {theirs};" in line
        )
        assert "mount this node's own or correct `data_dir`" in line
        assert stopped.processes() == []


def test_etcd_that_is_down_is_said_in_one_line(cluster: DevCluster) -> None:
    cluster.create("left", "1M")
    cluster.kill("etcd")
    for arguments in (("image", "ls"), ("image", "create", f"{POOL}/x", "1M"), ("pool", "ls")):
        assert "etcd" in refused(cluster, *arguments)
    status = cluster.try_hci("status", "--json")
    assert json.loads(status.stdout)["health"] == "unavailable"
    assert "hci dev run etcd" in cluster.try_hci("status").stdout
    cluster.run("etcd")
    cluster.await_health("ok")
    assert [image["name"] for image in cluster.json("image", "ls")] == [f"{POOL}/left"]


def test_killed_member_is_shown_until_it_runs_again(cluster: DevCluster) -> None:
    cluster.kill("node2")
    members = cluster.members()
    assert members["node2"]["state"] != "running"
    assert members["node1"]["state"] == "running"
    assert cluster.await_health("degraded") == "degraded"
    assert "node2" in cluster.try_hci("status").stdout
    cluster.run("node2")
    cluster.await_health("ok")


def test_stopped_cluster_started_again_has_its_images(cluster: DevCluster) -> None:
    cluster.create("kept", "8M")
    with NbdSession(cluster.url("kept"), 1) as session:
        session.call("write", 0, 64, 1)
    cluster.hci("dev", "stop")
    assert cluster.processes() == []
    assert {member["state"] for member in cluster.members().values()} == {"stopped"}
    cluster.start()
    with NbdSession(cluster.url("kept"), 1) as session:
        assert session.call("read", 0, 80) == [1] * 64 + [0] * 16
    assert cluster.info("kept")["stale"] == []
    assert cluster.health() == "ok"


def test_folder_that_holds_something_else_is_refused() -> None:
    with tempfile.TemporaryDirectory(prefix="hci-") as folder:
        (Path(folder) / "letter.txt").write_text("dear")
        made = DevCluster(directory=Path(folder))
        refused(made, "dev", "start", folder)
        assert (Path(folder) / "letter.txt").read_text() == "dear"
        assert made.processes() == []
