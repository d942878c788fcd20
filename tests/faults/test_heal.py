"""A node that was left behind becomes in sync by itself, while clients write."""

from __future__ import annotations

import contextlib
import random
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.devcluster import POOL, DevCluster
from tests.faults.flushed_writer import FlushedWriter
from tests.faults.load import (
    SIZE_MIB,
    STRIKE_S,
    ReconnectingDisk,
    VerifyingFio,
    await_write,
    drawn_seed,
    rounds,
)
from tests.faults.nbd_session import NbdSession
from tests.faults.shard_files import CRC32C_TABLE, crc32c
from tests.waiting import HANG_S, until

# A hang detector: a heal of these images takes a moment.
BLOCK_BYTES = 4096
RUN_BLOCKS = 256
AT_ONCE_S = 15.0
"""Far less than anything that is tried again late; the tool that measures heals has the goal."""


def heals(cluster: DevCluster, image: str) -> list[dict[str, Any]]:
    """What `hci heal status` says of an image, those under way first, then the latest."""
    listed: list[dict[str, Any]] = cluster.json("heal", "status")["images"]
    return [line for line in listed if line["image"] == f"{POOL}/{image}"]


def copies(cluster: DevCluster, image: str) -> bool:
    """Whether a heal of the image has come so far that there is something to disturb."""
    return any(line["bytes_done"] > 0 for line in heals(cluster, image))


def healed(cluster: DevCluster, image: str) -> dict[str, Any]:
    """The one heal that an image had. It is over a moment after the record takes the node in."""

    def is_over() -> bool:
        lines = heals(cluster, image)
        return bool(lines) and all(line["finished_at"] is not None for line in lines)

    until("the heal is over", is_over)
    (line,) = heals(cluster, image)
    return line


def stale(cluster: DevCluster, image: str) -> list[str]:
    return [entry["node"] for entry in cluster.info(image)["stale"]]


def await_in_sync(cluster: DevCluster, image: str) -> None:
    until(f"{image} has no stale node", lambda: not stale(cluster, image))


def fill(session: NbdSession, version: int, *, blocks: int, every: int = 1) -> None:
    """Writes runs of blocks, each `every`th one, and flushes."""
    for first in range(0, blocks, RUN_BLOCKS * every):
        session.call("write", first, RUN_BLOCKS, version)
    session.call("flush")


@contextlib.contextmanager
def slow_heal(cluster: DevCluster, rate: str = "2M") -> Iterator[None]:
    """Heals creep, so that there is time to disturb them."""
    before = cluster.config.read_text()
    limits = f'\n[heal]\nbytes_per_second = "{rate}"\nshards_at_once = 1\n'
    cluster.config.write_text(before + limits)
    cluster.kill("gateway1")
    cluster.run("gateway1")
    try:
        yield
    finally:
        cluster.config.write_text(before)
        cluster.kill("gateway1")
        cluster.run("gateway1")
        cluster.await_health("ok")


def test_node_killed_under_fio_verify_is_healed_and_serves_alone(
    cluster: DevCluster, tmp_path: Path
) -> None:
    for number in range(rounds(2)):
        seed = drawn_seed(number)
        chance = random.Random(seed)
        victim, other = chance.sample(cluster.nodes, 2)
        moment_s, away_s = chance.uniform(0, STRIKE_S), chance.uniform(0, STRIKE_S)
        print(
            f"round {number}: seed {seed}: {victim} {moment_s:.2f} s after the first write, "
            f"for {away_s:.2f} s, then {other}"
        )
        image = f"round-{number}"
        cluster.create(image, f"{SIZE_MIB}M")
        with VerifyingFio(cluster.url(image), seed, tmp_path) as fio:
            await_write(cluster, image, fio)
            time.sleep(moment_s)
            assert fio.is_running
            cluster.kill(victim)
            time.sleep(away_s)
            cluster.run(victim)
            await_in_sync(cluster, image)
            # From here on the healed node is needed: without it there is no quorum.
            cluster.kill(other)
            fio.finish()
        cluster.run(other)
        cluster.await_health("ok")
        cluster.must_be_equal(image)
        cluster.remove(image)


def test_healed_node_gives_what_it_missed(cluster: DevCluster) -> None:
    cluster.create("missed", "32M")
    seed = drawn_seed()
    with NbdSession(cluster.url("missed"), seed) as session:
        writer = FlushedWriter(session.blocks, seed)
        enough = threading.Event()
        running = threading.Thread(target=writer.run, args=(session, enough.is_set))
        running.start()
        try:
            time.sleep(0.5)
            cluster.kill("node1")
            time.sleep(1)
            cluster.run("node1")
            await_in_sync(cluster, "missed")
            # One after the other the nodes that it was healed from go: it is read, and in quorum.
            for other in ("node2", "node3"):
                cluster.kill(other)
                time.sleep(0.5)
                cluster.run(other)
                await_in_sync(cluster, "missed")
        finally:
            enough.set()
            running.join()
        assert writer.error is None
        assert writer.verify(session) == []
    cluster.await_health("ok")
    cluster.must_be_equal("missed")


def test_only_what_differs_travels(cluster: DevCluster) -> None:
    cluster.create("little", "128M")
    blocks = (128 << 20) // BLOCK_BYTES
    with NbdSession(cluster.url("little"), 1) as session:
        fill(session, 1, blocks=blocks)
        cluster.kill("node2")
        fill(session, 2, blocks=blocks, every=8)
        assert stale(cluster, "little") == ["node2"]
        assert cluster.health() == "degraded"
        cluster.run("node2")
        await_in_sync(cluster, "little")
        done = healed(cluster, "little")
        assert done["node"] == "node2"
        differ_bytes = (128 << 20) // 8
        assert differ_bytes <= done["bytes_done"] <= 1.1 * differ_bytes
    cluster.must_be_equal("little")


@pytest.mark.parametrize("killed", ["node2", "node1", "node3", "gateway1", "etcd"])
def test_heal_that_is_interrupted_goes_on(cluster: DevCluster, killed: str, tmp_path: Path) -> None:
    """The healed node, a source, the gateway or etcd dies in the middle of a heal."""
    cluster.create("creeps", "64M")
    blocks = (64 << 20) // BLOCK_BYTES
    with slow_heal(cluster):
        with ReconnectingDisk(cluster.url("creeps"), tmp_path) as disk:
            with NbdSession(disk.uri, 1) as session:
                fill(session, 1, blocks=blocks)
                cluster.kill("node2")
                fill(session, 2, blocks=blocks, every=2)
                cluster.run("node2")
                until("a heal is under way", lambda: copies(cluster, "creeps"))
                assert cluster.health() == "healing"
                cluster.kill(killed)
                waiting = session.submit("write", 5 * RUN_BLOCKS, 1, 3)
                cluster.run(killed)
                assert waiting.result(timeout=HANG_S) == []
                await_in_sync(cluster, "creeps")
                cluster.kill("node1")
                for first in range(0, blocks, RUN_BLOCKS):
                    version = 2 if first % (2 * RUN_BLOCKS) == 0 else 1
                    wanted = [version] * RUN_BLOCKS
                    if first == 5 * RUN_BLOCKS:
                        wanted[0] = 3
                    assert session.call("read", first, RUN_BLOCKS) == wanted
        cluster.run("node1")
        await_in_sync(cluster, "creeps")
        cluster.must_be_equal("creeps")


def test_node_that_missed_next_to_nothing_is_in_sync_at_once(cluster: DevCluster) -> None:
    cluster.create("brief", "64M")
    with NbdSession(cluster.url("brief"), 1) as session:
        fill(session, 1, blocks=(64 << 20) // BLOCK_BYTES)
        cluster.kill("node3")
        session.call("write", 0, 1, 2)
        session.call("flush")
        cluster.run("node3")
        until("node3 is in sync", lambda: not stale(cluster, "brief"), AT_ONCE_S)
        done = healed(cluster, "brief")
        assert done["bytes_done"] <= 2 * BLOCK_BYTES


def stale_and_closed(cluster: DevCluster, image: str) -> None:
    """Makes an image that node2 is stale for, filled with 2 in its first half, and leaves it."""
    blocks = (32 << 20) // BLOCK_BYTES
    cluster.create(image, "32M")
    with NbdSession(cluster.url(image), 1) as session:
        fill(session, 1, blocks=blocks)
        cluster.kill("node2")
        fill(session, 2, blocks=blocks // 2)
    until("the image is closed", lambda: cluster.info(image)["clean"])
    assert stale(cluster, image) == ["node2"]


def test_image_that_nobody_has_open_is_healed(cluster: DevCluster) -> None:
    stale_and_closed(cluster, "closed")
    cluster.run("node2")
    await_in_sync(cluster, "closed")
    cluster.await_health("ok")
    until("it is closed again", lambda: cluster.info("closed")["clean"])
    assert cluster.check("closed")["equal"]
    with NbdSession(cluster.url("closed"), 1) as session:
        cluster.kill("node1")
        half = (16 << 20) // BLOCK_BYTES
        for first in range(0, 2 * half, RUN_BLOCKS):
            version = 2 if first < half else 1
            assert session.call("read", first, RUN_BLOCKS) == [version] * RUN_BLOCKS


def progress_is_told(cluster: DevCluster, image: str, *, bytes_per_second: int) -> None:
    """Asserts that the heal under way, of such a rate, tells how far it is, and how long yet."""

    def line() -> dict[str, Any]:
        found = heals(cluster, image)[0]
        assert found["state"] == "healing", found
        return found

    # At first it has some of its rate in store.
    until("some seconds of it are over", lambda: line()["bytes_done"] >= 4 * bytes_per_second)
    told = line()
    assert (told["node"], told["finished_at"]) == ("node2", None)
    # Four times as much would be no limit, a tenth no heal, on a machine that is busy too.
    assert bytes_per_second / 10 < told["bytes_per_second"] < 4 * bytes_per_second, told
    # An estimate, from what the shards so far took.
    assert 0 < told["bytes_left"] < 4 * cluster.info(image)["size_bytes"], told
    assert told["eta_s"] == -(-told["bytes_left"] // told["bytes_per_second"]), told
    until("it goes on", lambda: line()["bytes_done"] > told["bytes_done"])


def test_image_that_is_healed_closed_opens_at_once(cluster: DevCluster) -> None:
    """Whoever wants it does not wait for the heal, which goes on while it is open."""
    with slow_heal(cluster, "1M"):
        stale_and_closed(cluster, "wanted")
        cluster.run("node2")
        until("a heal is under way", lambda: copies(cluster, "wanted"))
        with NbdSession(cluster.url("wanted"), 1) as session:
            session.call("write", 0, RUN_BLOCKS, 3)
            session.call("flush")
            assert session.call("read", 0, RUN_BLOCKS) == [3] * RUN_BLOCKS
            assert stale(cluster, "wanted") == ["node2"]
            progress_is_told(cluster, "wanted", bytes_per_second=1 << 20)
            await_in_sync(cluster, "wanted")
            done = healed(cluster, "wanted")
            assert (done["state"], done["bytes_left"], done["eta_s"]) == ("done", 0, 0)
        assert cluster.check("wanted")["equal"]


def blocks_of_ext4(content: int) -> bytes:
    """Blocks that end with their own CRC32C, begun from a seed and not inverted."""
    block = bytes([content]) * 4092
    seed = 0x1234_5678
    register = seed
    for byte in block:
        register = register >> 8 ^ CRC32C_TABLE[(register ^ byte) & 0xFF]
    return (block + struct.pack("<I", register)) * RUN_BLOCKS


def test_directories_of_ext4_are_healed(cluster: DevCluster, tmp_path: Path) -> None:
    # ext4 ends them with their own CRC32C. All of them have the same CRC32C then, whatever is in
    # them: as long as blocks were compared by it, a node was in sync with those from before.
    cluster.create("ext4", "16M")

    def write(content: int) -> None:
        blocks = blocks_of_ext4(content)
        assert crc32c(blocks[:4096]) == crc32c(blocks_of_ext4(1)[:4096])
        file = tmp_path / f"blocks-{content}"
        file.write_bytes(blocks)
        commands = ["-c", f"write -s {file} 0 {len(blocks)}", "-c", "flush"]
        subprocess.run(
            ["qemu-io", "-f", "raw", *commands, cluster.url("ext4")], check=True, timeout=60
        )
        until("it is closed", lambda: cluster.info("ext4")["clean"])

    write(1)
    cluster.kill("node2")
    write(77)
    assert stale(cluster, "ext4") == ["node2"]
    cluster.run("node2")
    await_in_sync(cluster, "ext4")
    cluster.must_be_equal("ext4")


def test_another_gateway_takes_an_image_from_its_heal() -> None:
    with DevCluster(gateways=2) as two:
        with slow_heal(two, "1M"):
            stale_and_closed(two, "taken")
            two.kill("gateway2")
            two.run("node2")
            until("a heal is under way", lambda: copies(two, "taken"))
            two.run("gateway2")
            with NbdSession(two.url_at("gateway2", "taken"), 1) as session:
                session.call("write", 0, RUN_BLOCKS, 3)
                session.call("flush")
                assert session.call("read", 0, RUN_BLOCKS) == [3] * RUN_BLOCKS
                await_in_sync(two, "taken")
                two.kill("node1")
                assert session.call("read", 0, RUN_BLOCKS) == [3] * RUN_BLOCKS
            two.run("node1")
            await_in_sync(two, "taken")
            assert two.check("taken")["equal"]
