"""Disks that rot: found by reads and by scrubs, never seen by a guest, repaired from the others."""

from __future__ import annotations

import contextlib
import json
import random
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import failed
from tests.devcluster import POOL, CommandError, DevCluster
from tests.faults.load import DURATION_S, VerifyingFio, drawn_seed
from tests.faults.nbd_session import NbdError, NbdSession
from tests.faults.shard_files import BLOCK_BYTES, BLOCKS, ShardFile, shard_files
from tests.faults.test_heal import RUN_BLOCKS, await_in_sync, fill
from tests.waiting import until

SIZE = "256M"
IMAGE_BLOCKS = (256 << 20) // BLOCK_BYTES
SHARDS = 4
"""So many lie in files, once the log has had its fill."""
OTHER = b"\x5a" * BLOCK_BYTES


@pytest.fixture(scope="module")
def rotting_cluster() -> Iterator[DevCluster]:
    """A cluster whose nodes have small logs, so that data soon lies in shard files."""
    with DevCluster(gateways=2) as cluster:
        cluster.shorten_logs()
        yield cluster


@pytest.fixture
def rotting(request: pytest.FixtureRequest, rotting_cluster: DevCluster) -> Iterator[DevCluster]:
    """The same for each test, without what former ones left."""
    yield rotting_cluster
    if failed(request.node):
        rotting_cluster.print_logs()
    rotting_cluster.mend()


def files(cluster: DevCluster, node: str, image: str) -> dict[int, ShardFile]:
    data_dir = Path(cluster.members()[node]["data_dir"])
    return shard_files(data_dir, cluster.info(image)["id"])


def write_to_files(cluster: DevCluster, image: str) -> list[int]:
    """Fills an image, and closes it; returns shards whose blocks lie in files on all nodes."""
    cluster.create(image, SIZE)
    with NbdSession(cluster.url(image), 1) as session:
        fill(session, 1, blocks=IMAGE_BLOCKS)
        until("shards lie in files", lambda: len(in_files(cluster, image)) >= SHARDS)
    until("the image is closed", lambda: cluster.info(image)["clean"])
    return in_files(cluster, image)


def in_files(cluster: DevCluster, image: str) -> list[int]:
    """Shards of which all nodes have most blocks in files."""
    image_id = cluster.info(image)["id"]
    members = cluster.members()
    full = [
        {
            shard
            for shard, file in shard_files(Path(members[node]["data_dir"]), image_id).items()
            if len(file.data_blocks()) > BLOCKS // 2
        }
        for node in cluster.nodes
    ]
    return sorted(set.intersection(*full))


def blocks_of(cluster: DevCluster, node: str, image: str, shard: int) -> list[int]:
    """Blocks of a shard that a node has in its file."""
    return files(cluster, node, image)[shard].data_blocks()


def scrub(cluster: DevCluster, image: str) -> dict[str, Any]:
    """Scrubs an image; returns what `hci scrub status` then says of it."""
    done = cluster.try_hci("scrub", "start", f"{POOL}/{image}", "--wait")
    assert done.returncode in (0, 1), done.stderr
    return status(cluster, image)


def status(cluster: DevCluster, image: str) -> dict[str, Any]:
    (line,) = cluster.json("scrub", "status", f"{POOL}/{image}")["images"]
    assert isinstance(line, dict)
    return line


def counted(cluster: DevCluster, image: str) -> dict[str, int]:
    """What the gateways count of an image's rot."""
    import tomllib

    found: dict[str, int] = {}
    config = tomllib.loads(cluster.config.read_text())
    for gateway in config["gateway"].values():
        with urllib.request.urlopen(f"http://{gateway['metrics']}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        for line in lines:
            if line.startswith("hci_image_rot_blocks_total{") and f'{POOL}/{image}"' in line:
                kind = line.partition('kind="')[2].partition('"')[0]
                found[kind] = found.get(kind, 0) + int(float(line.rsplit(" ", 1)[1]))
    return found


@contextlib.contextmanager
def slow_scrub(cluster: DevCluster) -> Iterator[None]:
    """Scrubs creep, so that there is time to disturb them."""
    before = cluster.config.read_text()
    try:
        cluster.config.write_text(before + '\n[scrub]\nevery = 0\nbytes_per_second = "16M"\n')
        for gateway in cluster.gateways:
            cluster.kill(gateway)
            cluster.run(gateway)
        cluster.await_health("ok")
        yield
    finally:
        cluster.config.write_text(before)
        for gateway in cluster.gateways:
            cluster.kill(gateway)
            cluster.run(gateway)


def test_rot_under_fio_is_never_seen_and_is_repaired(rotting: DevCluster, tmp_path: Path) -> None:
    seed = drawn_seed()
    chance = random.Random(seed)
    write_to_files(rotting, "busy")
    # The gateway reads from the node of its own host.
    rotten = list(files(rotting, "node1", "busy").values())
    flipped = 0
    with VerifyingFio(rotting.url("busy"), seed, tmp_path) as fio:
        until_s = time.monotonic() + DURATION_S
        while fio.is_running and time.monotonic() < until_s:
            file = chance.choice(rotten)
            blocks = file.data_blocks()
            for block in chance.sample(blocks, min(20, len(blocks))):
                file.flip(block)
                flipped += 1
            time.sleep(0.2)
        fio.finish()
    assert flipped > 20
    scrub(rotting, "busy")
    found = counted(rotting, "busy")
    assert found["found"] == found["repaired"] > 0, found
    assert scrub(rotting, "busy")["found"] == 0
    assert rotting.info("busy")["stale"] == []
    rotting.must_be_equal("busy")


def test_small_write_into_a_rotten_block_succeeds(rotting: DevCluster) -> None:
    shard = write_to_files(rotting, "small")[0]
    block = blocks_of(rotting, "node2", "small", shard)[3]
    files(rotting, "node2", "small")[shard].flip(block)
    generation = rotting.info("small")["generation"]
    import subprocess

    offset = (shard * BLOCKS + block) * BLOCK_BYTES + 512
    subprocess.run(
        ["qemu-io", "-f", "raw", "-c", f"write -P 7 {offset} 512", "-c", "flush",
         "-c", f"read -P 7 {offset} 512", rotting.url("small")],
        check=True, timeout=60,
    )  # fmt: skip
    assert rotting.info("small")["generation"] == generation, "nobody was left behind"
    # Counted when the gateway hears of it, which may be after the write is answered.
    until("it is counted", lambda: counted(rotting, "small").get("repaired", 0) > 0)
    assert counted(rotting, "small")["repaired"] == 1
    until("the image is closed", lambda: rotting.info("small")["clean"])
    rotting.must_be_equal("small")


def test_scrub_of_a_closed_image_repairs_what_nobody_read(rotting: DevCluster) -> None:
    first, *_, last = write_to_files(rotting, "idle")
    files(rotting, "node2", "idle")[first].flip(blocks_of(rotting, "node2", "idle", first)[0])
    files(rotting, "node3", "idle")[last].flip(blocks_of(rotting, "node3", "idle", last)[5])
    assert rotting.check("idle")["different"] == [
        {"shard": first, "nodes": ["node2"], "unreadable": ["node2"]},
        {"shard": last, "nodes": ["node3"], "unreadable": ["node3"]},
    ]
    line = scrub(rotting, "idle")
    assert (line["found"], line["repaired"], line["bad"]) == (2, 2, [])
    assert scrub(rotting, "idle")["found"] == 0
    until("the image is closed", lambda: rotting.info("idle")["clean"])
    assert rotting.health() == "ok"
    rotting.must_be_equal("idle")


def test_rot_with_a_valid_checksum_is_found_by_the_majority(rotting: DevCluster) -> None:
    shard = write_to_files(rotting, "hidden")[1]
    block = blocks_of(rotting, "node2", "hidden", shard)[7]
    rotting.kill("node2")
    files(rotting, "node2", "hidden")[shard].replace(block, OTHER)
    rotting.run("node2")
    rotting.await_health("ok")
    done = rotting.try_hci("image", "check", f"{POOL}/hidden", "--json")
    report = json.loads(done.stdout)
    assert (done.returncode, report["equal"]) == (1, False), "its checksum is right"
    assert report["different"] == [{"shard": shard, "nodes": ["node2"], "unreadable": []}]
    shown = rotting.try_hci("image", "check", f"{POOL}/hidden")
    assert shown.returncode == 1
    assert f"{POOL}/hidden: shard {shard} differs on node2\n" in shown.stdout
    assert "are equal" not in shown.stdout
    line = scrub(rotting, "hidden")
    assert (line["found"], line["repaired"], line["undecided"]) == (1, 1, 0)
    rotting.must_be_equal("hidden")


def test_two_that_differ_are_reported_and_left_alone(rotting: DevCluster) -> None:
    shard = write_to_files(rotting, "pair")[1]
    with NbdSession(rotting.url("pair"), 1) as session:
        rotting.kill("node3")
        session.call("write", IMAGE_BLOCKS - 1, 1, 10)
        session.call("flush")
    until("the image is closed", lambda: rotting.info("pair")["clean"])
    assert [entry["node"] for entry in rotting.info("pair")["stale"]] == ["node3"]
    block = blocks_of(rotting, "node2", "pair", shard)[7]
    rotting.kill("node2")
    files(rotting, "node2", "pair")[shard].replace(block, OTHER)
    rotting.run("node2")
    rotting.await_nodes("up", "node2")
    with pytest.raises(CommandError) as failed:
        rotting.hci("scrub", "start", f"{POOL}/pair", "--wait")
    assert failed.value.exit_code == 1
    line = status(rotting, "pair")
    expected = {"shard": shard, "block": block, "blocks": 1, "nodes": ["node1", "node2"]}
    assert [{**bad, "nodes": sorted(bad["nodes"])} for bad in line["bad"]] == [expected]
    assert line["repaired"] == 0
    assert "differ" in rotting.hci("status")
    assert rotting.info("pair")["bad_blocks"]


def test_lost_metadata_of_a_shard_is_given_back(rotting: DevCluster) -> None:
    shard = write_to_files(rotting, "meta")[1]
    rotting.kill("node3")
    files(rotting, "node3", "meta")[shard].spoil_metadata()
    rotting.run("node3")
    rotting.await_health("ok")
    line = scrub(rotting, "meta")
    assert line["found"] == line["repaired"] == BLOCKS
    assert rotting.info("meta")["stale"] == []
    rotting.must_be_equal("meta")


def test_block_bad_everywhere_fails_alone_until_it_is_overwritten(rotting: DevCluster) -> None:
    shard = write_to_files(rotting, "lost")[1]
    held = [set(blocks_of(rotting, node, "lost", shard)) for node in rotting.nodes]
    rotten = sorted(set.intersection(*held))[4]
    for node in rotting.nodes:
        files(rotting, node, "lost")[shard].flip(rotten)
    block = shard * BLOCKS + rotten
    with NbdSession(rotting.url("lost"), 1) as session:
        with pytest.raises(NbdError):
            session.call("read", block, 1)
        assert session.call("read", block + 1, 1) and session.call("read", block - 1, 1)
        until("it is reported", lambda: rotting.health() == "degraded")
        until("it is named", lambda: rotting.info("lost")["bad_blocks"])
        session.call("write", block, 1, 11)
        assert session.call("read", block, 1) == [11]
        assert scrub(rotting, "lost")["bad"] == []
        assert rotting.health() == "ok"


@pytest.mark.parametrize("killed", ["gateway", "node2"])
def test_scrub_that_is_interrupted_goes_on(rotting: DevCluster, killed: str) -> None:
    slow = f"slow-{killed}"
    shard = write_to_files(rotting, slow)[-1]
    with slow_scrub(rotting):
        files(rotting, "node2", slow)[shard].flip(blocks_of(rotting, "node2", slow, shard)[5])
        rotting.hci("scrub", "start", f"{POOL}/{slow}")
        until("it is under way", lambda: (status(rotting, slow)["done"] or 0) > 0.1)
        assert not rotting.try_hci("status").returncode
        victims = rotting.gateways if killed == "gateway" else [killed]
        for victim in victims:
            rotting.kill(victim)
        for victim in victims:
            rotting.run(victim)
        until("it is through", lambda: status(rotting, slow)["state"] == "done")
    line = status(rotting, slow)
    # What was found since it was last saved is repaired, and not counted again.
    assert line["found"] == line["repaired"] <= 1
    await_in_sync(rotting, slow)
    if killed in line["missed"]:
        # If it was away when the turn of its rot came, which is said, the next scrub finds it: the
        # one asked for, or one of what was missed, which begins by itself and goes on counting.
        again = scrub(rotting, slow)
        assert not again["missed"]
        assert again["found"] == again["repaired"] <= 1
    repairs = f"event=bitrot_repaired image={POOL}/{slow} "
    logs = [Path(rotting.members()[each]["log"]).read_text() for each in rotting.gateways]
    assert sum(log.count(repairs) for log in logs) <= 1, "what is repaired is found again"
    # Whichever of them repaired it: every block of every node is read, and the rot is gone.
    until("the image is closed", lambda: rotting.info(slow)["clean"])
    rotting.must_be_equal(slow)


def test_image_that_is_scrubbed_opens_at_once_at_another_gateway(rotting: DevCluster) -> None:
    write_to_files(rotting, "wanted")
    with slow_scrub(rotting):
        rotting.kill("gateway2")
        rotting.hci("scrub", "start", f"{POOL}/wanted")
        until("it is under way", lambda: (status(rotting, "wanted")["done"] or 0) > 0)
        rotting.run("gateway2")
        begun = time.monotonic()
        with NbdSession(rotting.url_at("gateway2", "wanted"), 1) as session:
            assert session.call("read", 0, RUN_BLOCKS) == [1] * RUN_BLOCKS
            assert time.monotonic() - begun < 10
            session.call("write", 0, RUN_BLOCKS, 3)
            session.call("flush")
        rotting.hci("scrub", "stop", f"{POOL}/wanted")
        until("it has ended", lambda: status(rotting, "wanted")["state"] in ("never", "done"))
