"""`hci image diff`, and NBD's contexts that tell the same, on a cluster of real processes."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.cluster.test_snapshots import closed, copied, is_refused, take, url_at
from tests.devcluster import POOL, DevCluster
from tests.faults.nbd_session import NbdSession

KIB, MIB, TIB = 1 << 10, 1 << 20, 1 << 40
BLOCK = 4 * KIB
SYSTEM_PYTHON = "/usr/bin/python3"


@pytest.fixture(scope="module")
def two() -> Iterator[DevCluster]:
    """A cluster with two gateways, for all tests of this module."""
    with DevCluster(gateways=2) as started:
        yield started


def diff(cluster: DevCluster, *states: str) -> list[tuple[int, int, str]]:
    found = cluster.json("image", "diff", *(f"{POOL}/{state}" for state in states))
    return [(each["offset_bytes"], each["length_bytes"], each["type"]) for each in found]


def qemu_io(cluster: DevCluster, image: str, *commands: str, gateway: str = "gateway1") -> None:
    words = [word for command in commands for word in ("-c", command)]
    uri = url_at(cluster, gateway, image)
    subprocess.run(["qemu-io", "-f", "raw", *words, uri], check=True, stdout=subprocess.DEVNULL)
    closed(cluster, image)


def wrote_and_took(cluster: DevCluster, image: str, rounds: int, seed: int) -> list[set[int]]:
    """Write blocks by chance and take snapshots s0, s1 …; return the blocks that each round wrote,
    those after the last snapshot too."""
    chance = random.Random(seed)
    written = []
    for number in range(rounds + 1):
        blocks = set(chance.sample(range(16 * MIB // BLOCK), 20))
        writes = [f"write -P {number + 1} {block * BLOCK} 4k" for block in sorted(blocks)]
        qemu_io(cluster, image, *writes)
        written.append(blocks)
        if number < rounds:
            take(cluster, f"{image}@s{number}")
            closed(cluster, image)
    return written


def blocks_of(found: list[tuple[int, int, str]]) -> set[int]:
    return {
        block
        for offset, length, _ in found
        for block in range(offset // BLOCK, -(-(offset + length) // BLOCK))
    }


def test_diff_lists_exactly_what_was_written_between_two_snapshots_and_until_now(
    two: DevCluster,
) -> None:
    two.create("web", "16M")
    written = wrote_and_took(two, "web", 3, seed=1)
    assert blocks_of(diff(two, "web@s0", "web@s1")) == written[1]
    assert blocks_of(diff(two, "web@s0", "web@s2")) == written[1] | written[2]
    assert blocks_of(diff(two, "web@s2")) == written[3]
    assert blocks_of(diff(two, "web@s0", "web")) == written[1] | written[2] | written[3]
    closed(two, "web")
    # Snapshots below, between and at the beginning of what is compared with go; what is told stays.
    two.hci("snapshot", "rm", f"{POOL}/web@s1", "--wait")
    assert blocks_of(diff(two, "web@s0", "web@s2")) == written[1] | written[2]
    two.hci("snapshot", "rm", f"{POOL}/web@s0", "--wait")
    assert blocks_of(diff(two, "web@s2")) == written[3]
    closed(two, "web")
    two.hci("snapshot", "rollback", f"{POOL}/web@s2")
    assert diff(two, "web@s2") == []


def test_diff_joins_neighbours_and_tells_zeroes_from_data(two: DevCluster) -> None:
    two.create("parts", "16M")
    qemu_io(two, "parts", "write -P 1 0 8M")
    take(two, "parts@s")
    closed(two, "parts")
    qemu_io(
        two, "parts", "write -P 2 3M 2M", "write -z -u 6M 1M", "write -P 3 9000 10", "discard 7M 4k"
    )
    expected = [
        (8 * KIB, 4 * KIB, "data"),
        (3 * MIB, 2 * MIB, "data"),
        (6 * MIB, MIB + 4 * KIB, "zero"),
    ]
    assert diff(two, "parts@s") == expected
    shown = two.hci("image", "diff", f"{POOL}/parts@s")
    assert "since vms/parts@s 2 MiB of data were written and 1 MiB zeroed, in 3 parts" in " ".join(
        shown.split()
    )
    take(two, "parts@t")
    assert diff(two, "parts@s", "parts@t") == expected
    assert "nothing was written since vms/parts@t" in two.hci("image", "diff", f"{POOL}/parts@t")


def test_diff_of_an_image_whose_size_changed(two: DevCluster) -> None:
    two.create("grows", "5122K")
    qemu_io(two, "grows", "write -P 1 0 5122K")
    take(two, "grows@s")
    closed(two, "grows")
    two.hci("image", "resize", f"{POOL}/grows", "9M")
    qemu_io(two, "grows", "write -P 1 8M 1M")
    assert diff(two, "grows@s") == [(8 * MIB, MIB, "data")]
    take(two, "grows@t")
    closed(two, "grows")
    two.hci("image", "resize", f"{POOL}/grows", "4100K", "--force")
    assert diff(two, "grows@t") == []
    assert diff(two, "grows@s", "grows@t") == [(8 * MIB, MIB, "data")]


def test_diff_of_an_image_that_is_open_ends_where_the_image_does(two: DevCluster) -> None:
    two.create("open", "4098K")
    take(two, "open@s")
    with NbdSession(url_at(two, "gateway1", "open"), 1) as session:
        session.call("write", 0, 2, 7)
        assert diff(two, "open@s") == [(0, 2 * BLOCK, "data")]
        session.call("write", 5, 1, 8)
        assert diff(two, "open@s") == [(0, 2 * BLOCK, "data"), (5 * BLOCK, BLOCK, "data")]
    closed(two, "open")
    qemu_io(two, "open", "write -P 4 4M 1k")
    assert diff(two, "open@s")[-1] == (4 * MIB, 2 * KIB, "data")


def test_diff_goes_on_without_a_node_and_is_the_same_after_its_heal(two: DevCluster) -> None:
    two.create("heals", "16M")
    written = wrote_and_took(two, "heals", 1, seed=3)
    two.kill("node2")
    more = {7, 300, 4000}
    qemu_io(two, "heals", *(f"write -P 9 {block * BLOCK} 4k" for block in more))
    take(two, "heals@t")
    closed(two, "heals")
    assert blocks_of(diff(two, "heals@s0")) == written[1] | more
    two.run("node2")
    two.await_health("ok")
    two.kill("node1")
    try:
        assert blocks_of(diff(two, "heals@s0")) == written[1] | more
        assert blocks_of(diff(two, "heals@s0", "heals@t")) == written[1] | more
    finally:
        two.run("node1")
        two.await_health("ok")


def test_diff_of_a_huge_image_asks_only_where_something_is(two: DevCluster) -> None:
    two.create("huge", str(8 * TIB))
    take(two, "huge@s")
    closed(two, "huge")
    qemu_io(two, "huge", f"write -P 1 {5 * TIB} 4k", f"write -P 1 {8 * TIB - 4096} 4k")
    take(two, "huge@t")
    # Asked shard by shard, of which there are two million, this would take minutes.
    ends = [(5 * TIB, BLOCK, "data"), (8 * TIB - BLOCK, BLOCK, "data")]
    assert diff(two, "huge@s", "huge@t") == ends
    assert diff(two, "huge@s") == ends


def test_diffs_that_make_no_sense_are_refused_in_one_line(two: DevCluster) -> None:
    for image in ("odd", "other"):
        two.create(image, "1M")
        take(two, f"{image}@s")
    take(two, "odd@t")
    command = ("image", "diff")
    older, newer = f"{POOL}/odd@s", f"{POOL}/odd@t"
    assert "has no snapshot u" in is_refused(two, *command, f"{POOL}/odd@u")
    assert "has no snapshot u" in is_refused(two, *command, older, f"{POOL}/odd@u")
    assert "names no snapshot: write" in is_refused(two, *command, f"{POOL}/odd")
    assert "there is no image vms/none" in is_refused(two, *command, f"{POOL}/none@s")
    assert f"{newer} is newer than {older}: name the" in is_refused(two, *command, newer, older)
    assert f"{older} is the same as {older}" in is_refused(two, *command, older, older)
    strange = is_refused(two, *command, older, f"{POOL}/other")
    assert f"{older} is no snapshot of {POOL}/other: name two states of one image" in strange


# NBD


def nbdinfo_map(uri: str, context: str) -> list[tuple[int, int, int]]:
    said = subprocess.run(
        ["nbdinfo", "--json", f"--map={context}", uri], check=True, capture_output=True, timeout=60
    ).stdout
    return [(each["offset"], each["length"], each["type"]) for each in json.loads(said)]


@pytest.fixture(scope="module")
def layered(two: DevCluster) -> DevCluster:
    """With an image of three layers, each with a MiB of its own."""
    two.create("layers", "8M")
    for number, name in enumerate(("first", "zweiter Stand é", None)):
        qemu_io(two, "layers", f"write -P {number + 1} {2 * number}M 1M")
        if name is not None:
            take(two, f"layers@{name}")
            closed(two, "layers")
    return two


def test_nbdinfo_maps_what_was_written_since_a_snapshot(layered: DevCluster) -> None:
    now = url_at(layered, "gateway2", "layers")
    assert nbdinfo_map(now, "qemu:dirty-bitmap:first") == [
        *((0, 2 * MIB, 0), (2 * MIB, MIB, 1), (3 * MIB, MIB, 0), (4 * MIB, MIB, 1)),
        (5 * MIB, 3 * MIB, 0),
    ]
    second = url_at(layered, "gateway2", "layers@zweiter Stand é")
    assert nbdinfo_map(second, "qemu:dirty-bitmap:first") == [
        *((0, 2 * MIB, 0), (2 * MIB, MIB, 1), (3 * MIB, 5 * MIB, 0)),
    ]


def test_nbdinfo_maps_the_depth_of_each_layer(layered: DevCluster) -> None:
    now = url_at(layered, "gateway1", "layers")
    assert nbdinfo_map(now, "qemu:allocation-depth") == [
        *((0, MIB, 3), (MIB, MIB, 0), (2 * MIB, MIB, 2), (3 * MIB, MIB, 0), (4 * MIB, MIB, 1)),
        (5 * MIB, 3 * MIB, 0),
    ]


def test_nbdinfo_lists_the_contexts_of_older_snapshots_only(layered: DevCluster) -> None:
    def contexts(name: str) -> set[str]:
        uri = url_at(layered, "gateway1", name)
        said = subprocess.run(["nbdinfo", "--json", uri], check=True, capture_output=True).stdout
        return set(json.loads(said)["exports"][0]["contexts"])

    always = {"base:allocation", "qemu:allocation-depth"}
    bitmaps = {"qemu:dirty-bitmap:first", "qemu:dirty-bitmap:zweiter Stand é"}
    assert contexts("layers") == always | bitmaps
    assert contexts("layers@zweiter Stand é") == always | {"qemu:dirty-bitmap:first"}
    assert contexts("layers@first") == always


LIBNBD = """
import json, nbd, sys
h = nbd.NBD()
names = ["base:allocation", "qemu:allocation-depth", *sys.argv[2:]]
for name in names:
    h.add_meta_context(name)
h.connect_uri(sys.argv[1])
found = {}
def take(name, offset, extents, error):
    found[name] = extents
h.block_status(h.get_size(), 0, take)
print(json.dumps({"found": found, "can": [h.can_meta_context(name) for name in names]}))
"""


def test_libnbd_gets_several_contexts_in_one_answer(layered: DevCluster) -> None:
    bitmaps = ["qemu:dirty-bitmap:first", "qemu:dirty-bitmap:zweiter Stand é"]
    arguments = [url_at(layered, "gateway1", "layers"), *bitmaps, "qemu:dirty-bitmap:none"]
    said = subprocess.run(
        [SYSTEM_PYTHON, "-c", LIBNBD, *arguments], check=True, capture_output=True, timeout=60
    ).stdout
    told: dict[str, Any] = json.loads(said)
    assert told["can"] == [True, True, True, True, False]
    found = told["found"]
    assert found[bitmaps[0]] == [2 * MIB, 0, MIB, 1, MIB, 0, MIB, 1, 3 * MIB, 0]
    assert found[bitmaps[1]] == [4 * MIB, 0, MIB, 1, 3 * MIB, 0]
    depths = [MIB, 3, MIB, 0, MIB, 2, MIB, 0, MIB, 1, 3 * MIB, 0]
    assert found["qemu:allocation-depth"] == depths
    assert found["base:allocation"] == [
        3 if each == 0 else 0 if i % 2 else each for i, each in enumerate(depths)
    ]


def test_qemu_maps_and_copies_by_a_bitmap(layered: DevCluster, tmp_path: Path) -> None:
    """As backup programs do: the map says what to copy, which goes onto what they have."""
    socket = layered.gateway_socket("gateway1")
    export = f"{POOL}/layers"
    options = (
        f"driver=nbd,server.type=unix,server.path={socket},export={export},"
        "x-dirty-bitmap=qemu:dirty-bitmap:first"
    )
    said = subprocess.run(
        ["qemu-img", "map", "--output=json", "--image-opts", options],
        check=True, capture_output=True, timeout=60,
    ).stdout  # fmt: skip
    # QEMU shows what is dirty as no data: it takes the bitmap for an allocation.
    dirty = [(each["start"], each["length"]) for each in json.loads(said) if not each["data"]]
    assert dirty == [(2 * MIB, MIB), (4 * MIB, MIB)]
    backup = bytearray(copied(url_at(layered, "gateway2", "layers@first"), tmp_path / "first"))
    now = copied(url_at(layered, "gateway1", "layers"), tmp_path / "now")
    assert backup != now
    for start, length in dirty:
        backup[start : start + length] = now[start : start + length]
    assert backup == now


def test_bitmap_of_a_snapshot_that_goes_meanwhile_is_an_error_and_reads_go_on(
    two: DevCluster,
) -> None:
    two.create("goes", "16M")
    wrote_and_took(two, "goes", 2, seed=8)
    closed(two, "goes")
    script = LIBNBD.replace("found = {}", "print(flush=True); input(); found = {}").replace(
        'print(json.dumps({"found": found, "can": [h.can_meta_context(name) for name in names]}))',
        "",
    )
    reading = subprocess.Popen(
        [SYSTEM_PYTHON, "-c", script, f"nbd+unix:///{POOL}/{quote('goes@s1')}"
         f"?socket={two.gateway_socket('gateway2')}", "qemu:dirty-bitmap:s0"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert reading.stdout is not None
    assert reading.stdout.readline() == "\n"
    two.hci("snapshot", "rm", f"{POOL}/goes@s0", "--wait")
    _, stderr = reading.communicate("\n", timeout=60)
    assert reading.returncode != 0
    assert "Input/output error" in stderr, stderr
