"""`hci image clone` on a cluster of real processes: images that begin on snapshots of others."""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cluster.test_snapshots import closed, copied, is_refused, take, url_at, write_at
from tests.devcluster import POOL, DevCluster, used_bytes
from tests.faults.load import ReconnectingDisk, VerifyingFio, await_write
from tests.waiting import until

MIB = 1 << 20


@pytest.fixture(scope="module")
def two() -> Iterator[DevCluster]:
    """A cluster with two gateways, for all tests of this module: each has images of its own."""
    with DevCluster(gateways=2) as started:
        yield started


def clone(cluster: DevCluster, source: str, name: str) -> str:
    return cluster.hci("image", "clone", f"{POOL}/{source}", f"{POOL}/{name}")


def changed(uri: str, *commands: str) -> None:
    """Change an image as qemu-io's commands say, durably."""
    asked = [word for command in (*commands, "flush") for word in ("-c", command)]
    subprocess.run(["qemu-io", "-f", "raw", *asked, uri], check=True, timeout=60)


def filled(cluster: DevCluster, image: str, size_mib: int, file: Path) -> bytes:
    """Make an image with content, and a snapshot `s` of it; it is closed then."""
    cluster.create(image, f"{size_mib}M")
    content = os.urandom(size_mib * MIB)
    write_at(url_at(cluster, "gateway1", image), content, file)
    take(cluster, f"{image}@s")
    closed(cluster, image)
    return content


def test_clone_holds_what_the_snapshot_does_and_is_written_apart(
    two: DevCluster, tmp_path: Path
) -> None:
    file = tmp_path / "content"
    content = filled(two, "template", 16, file)
    assert "16 MiB, a clone of" in clone(two, "template@s", "first")
    clone(two, "template@s", "second")
    uri = url_at(two, "gateway2", "first")
    assert copied(uri, file) == content
    changed(uri, "write -P 7 20k 4k", "write -z 36k 4k")
    wanted = bytearray(content)
    wanted[5 * 4096 : 6 * 4096] = b"\x07" * 4096
    wanted[9 * 4096 : 10 * 4096] = bytes(4096)
    write_at(url_at(two, "gateway1", "template"), os.urandom(16 * MIB), file)
    for gateway in two.gateways:
        assert copied(url_at(two, gateway, "template@s"), file) == content
    for image, held in (("first", bytes(wanted)), ("second", content)):
        assert copied(url_at(two, "gateway1", image), file) == held
        closed(two, image)
        assert copied(url_at(two, "gateway2", image), file) == held
        closed(two, image)
        report = two.check(image)
        assert report["equal"], report
    assert two.info("first")["parent"] == {"image": f"{POOL}/template", "snapshot": "s"}
    assert two.info("template")["clones"] == [f"{POOL}/first", f"{POOL}/second"]
    assert two.info("template")["parent"] is None
    listed = {each["name"]: each for each in two.json("image", "ls")}
    assert listed[f"{POOL}/second"]["parent"]["snapshot"] == "s"
    assert two.json("snapshot", "info", f"{POOL}/template@s")["clones"] == [
        f"{POOL}/first",
        f"{POOL}/second",
    ]
    # What it shares with its parent is not counted twice.
    assert used_bytes(two.info("second")) < 1 * MIB


def test_what_clones_begin_on_is_kept_until_they_are_gone(two: DevCluster, tmp_path: Path) -> None:
    file = tmp_path / "content"
    content = filled(two, "kept", 8, file)
    take(two, "kept@older")
    take(two, "kept@newer")
    clone(two, "kept@newer", "keeps")
    said = is_refused(two, "snapshot", "rm", f"{POOL}/kept@newer")
    assert f"a clone begins on what it holds ({POOL}/keeps)" in said
    assert "hci image rm" in said
    is_refused(two, "snapshot", "rollback", f"{POOL}/kept@s", "--force")
    assert "keeps" in is_refused(two, "image", "rm", f"{POOL}/kept", "--with-snapshots")
    two.hci("snapshot", "rm", f"{POOL}/kept@older", "--wait")
    two.hci("snapshot", "rm", f"{POOL}/kept@s", "--wait")
    assert copied(url_at(two, "gateway2", "keeps"), file) == content
    closed(two, "keeps")
    two.hci("image", "rm", f"{POOL}/keeps")
    two.hci("snapshot", "rm", f"{POOL}/kept@newer", "--wait")
    assert copied(url_at(two, "gateway1", "kept"), file) == content
    closed(two, "kept")
    two.hci("image", "rm", f"{POOL}/kept")


def test_clone_does_what_any_image_does(two: DevCluster, tmp_path: Path) -> None:
    file = tmp_path / "content"
    content = filled(two, "base", 8, file)
    clone(two, "base@s", "guest")
    two.hci("image", "resize", f"{POOL}/guest", "12M")
    uri = url_at(two, "gateway1", "guest")
    # Beyond its parent's end there are zeroes.
    assert copied(uri, file) == content + bytes(4 * MIB)
    take(two, "guest@before")
    other = os.urandom(12 * MIB)
    write_at(uri, other, file)
    closed(two, "guest")
    two.hci("snapshot", "rollback", f"{POOL}/guest@before")
    assert copied(uri, file) == content + bytes(4 * MIB)
    closed(two, "guest")
    clone(two, "guest@before", "grandchild")
    assert copied(url_at(two, "gateway2", "grandchild"), file) == content + bytes(4 * MIB)
    closed(two, "grandchild")
    exported = tmp_path / "exported.raw"
    two.hci("image", "export", f"{POOL}/grandchild", str(exported))
    assert exported.read_bytes() == content + bytes(4 * MIB)
    closed(two, "grandchild")
    for image in ("guest", "grandchild"):
        report = two.check(image)
        assert report["equal"], report


def test_clones_of_a_template_are_made_at_one_time_while_it_is_in_use(
    two: DevCluster, tmp_path: Path
) -> None:
    two.create("busy", "64M")
    with (
        ReconnectingDisk(url_at(two, "gateway1", "busy"), tmp_path) as disk,
        VerifyingFio(disk.uri, 1, tmp_path) as fio,
    ):
        await_write(two, "busy", fio)
        take(two, "busy@s")
        names = [f"copy{number}" for number in range(12)]
        clone(two, "busy@s", names[0])
        assert fio.is_running
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda name: clone(two, "busy@s", name), names[1:]))
        held = copied(url_at(two, "gateway2", "busy@s"), tmp_path / "held")
        for name in names[:3]:
            assert copied(url_at(two, "gateway2", name), tmp_path / "file") == held
        fio.finish()
    assert two.info("busy")["clones"] == sorted(f"{POOL}/{name}" for name in names)
    for name in names:
        closed(two, name)
        two.hci("image", "rm", f"{POOL}/{name}")
    assert two.info("busy")["clones"] == []


def test_node_that_was_away_as_a_clone_was_made_serves_it_when_it_is_healed(
    two: DevCluster, tmp_path: Path
) -> None:
    file = tmp_path / "content"
    two.create("away", "16M")
    uri = url_at(two, "gateway1", "away")
    write_at(uri, os.urandom(16 * MIB), file)
    two.kill("node1")
    try:
        content = os.urandom(16 * MIB)
        write_at(uri, content, file)
        take(two, "away@s")
        clone(two, "away@s", "made")
        stale = two.info("made")["stale"]
        assert [(each["node"], each["since_generation"]) for each in stale] == [("node1", 0)]
        changed(url_at(two, "gateway2", "made"), "write -P 0x33 12k 4k")
    finally:
        two.run("node1")
    two.await_health("ok")
    until("both are healed", lambda: not two.info("made")["stale"] + two.info("away")["stale"])
    wanted = bytearray(content)
    wanted[3 * 4096 : 4 * 4096] = b"\x33" * 4096
    # gateway1 reads from node1, which is on its host.
    assert copied(url_at(two, "gateway1", "made"), file) == bytes(wanted)
    closed(two, "made")
    report = two.check("made")
    assert report["equal"] and not report["missing"], report


def test_gateway_killed_as_a_clone_is_made_leaves_it_whole_or_none(
    two: DevCluster, tmp_path: Path
) -> None:
    file, chance = tmp_path / "content", random.Random(7)
    content = filled(two, "struck", 8, file)
    for number in range(3):
        take(two, f"struck@{number}")
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(
                two.try_hci, "image", "clone", f"{POOL}/struck@{number}", f"{POOL}/child{number}"
            )
            time.sleep(chance.uniform(0.0, 0.6))
            two.kill("gateway1")
            asked.result()
        two.run("gateway1")
        two.await_health("ok")
        names = {each["name"] for each in two.json("image", "ls")}
        if f"{POOL}/child{number}" in names:
            assert two.info("struck")["clones"] == [f"{POOL}/child{number}"]
            assert copied(url_at(two, "gateway2", f"child{number}"), file) == content
            closed(two, f"child{number}")
            two.hci("image", "rm", f"{POOL}/child{number}")
        assert two.info("struck")["clones"] == []
