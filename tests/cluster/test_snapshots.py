"""`hci snapshot` on a cluster of real processes: taken while guests write, read at any gateway."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.devcluster import POOL, CommandError, DevCluster
from tests.faults.flushed_writer import BlockHistory, FlushedWriter
from tests.faults.load import drawn_seed
from tests.faults.nbd_session import NbdError, NbdSession
from tests.faults.writing import await_progress, writing
from tests.tools.load import SteadyLoad
from tests.waiting import until

MIB = 1 << 20
STALL_S = 3.0
"""A hang detector: what a guest waits for a snapshot `make stalls` measures."""


@pytest.fixture(scope="module")
def two() -> Iterator[DevCluster]:
    """A cluster with two gateways, for all tests of this module: images keep their snapshots."""
    with DevCluster(gateways=2) as started:
        yield started


def take(cluster: DevCluster, name: str) -> dict[str, Any]:
    taken: dict[str, Any] = cluster.json("snapshot", "create", f"{POOL}/{name}")
    return taken


def url_at(cluster: DevCluster, gateway: str, name: str) -> str:
    return f"nbd+unix:///{POOL}/{quote(name)}?socket={cluster.gateway_socket(gateway)}"


def copied(uri: str, file: Path) -> bytes:
    """What nbdcopy reads there."""
    subprocess.run(["nbdcopy", uri, str(file)], check=True, timeout=60)
    content = file.read_bytes()
    file.unlink()
    return content


def write_at(uri: str, what: bytes, file: Path) -> None:
    """Write to an image over NBD, from its beginning."""
    file.write_bytes(what)
    subprocess.run(["nbdcopy", str(file), uri], check=True, timeout=60)
    file.unlink()


def closed(cluster: DevCluster, image: str) -> None:
    until(f"{image} is closed", lambda: cluster.info(image)["open_on"] is None)


def is_refused(cluster: DevCluster, *arguments: str) -> str:
    with pytest.raises(CommandError) as raised:
        cluster.hci(*arguments)
    assert raised.value.exit_code == 1
    assert "\n" not in raised.value.stderr
    return raised.value.stderr


def test_snapshots_under_writes_are_equal_wherever_and_whenever_they_are_read(
    two: DevCluster, tmp_path: Path
) -> None:
    two.create("busy", "64M")
    held, seed = [], drawn_seed()
    with NbdSession(url_at(two, "gateway1", "busy"), seed) as session:
        with writing(session, seed) as writer:
            for number in range(3):
                await_progress(writer)
                held.append(take(two, f"busy@s{number}")["held_ms"])
            await_progress(writer)
            early = [
                copied(url_at(two, "gateway2", f"busy@s{number}"), tmp_path / "early")
                for number in range(3)
            ]
        assert writer.verify(session) == []
    print(f"writes waited {held} ms")
    assert len(set(early)) == 3
    for number, content in enumerate(early):
        for gateway in two.gateways:
            assert copied(url_at(two, gateway, f"busy@s{number}"), tmp_path / "late") == content
        exported = tmp_path / "exported.img"
        two.hci("image", "export", f"{POOL}/busy@s{number}", str(exported), "--force")
        assert exported.read_bytes() == content
    report = two.check("busy")
    assert report["equal"], report
    assert [each["name"] for each in report["snapshots"]] == ["s0", "s1", "s2"]


def test_snapshot_holds_each_write_that_was_answered_before_it(two: DevCluster) -> None:
    two.create("stamped", "32M")
    enough = threading.Event()
    with NbdSession(url_at(two, "gateway1", "stamped"), 5) as session:
        writer = FlushedWriter(session.blocks, 5)
        running = threading.Thread(target=writer.run, args=(session, enough.is_set))
        running.start()
        time.sleep(1)
        before = {block: history.answered for block, history in list(writer.histories.items())}
        take(two, "stamped@s")
        sent = {block: list(h.contents) for block, h in list(writer.histories.items())}
        time.sleep(0.5)
        enough.set()
        running.join()
        assert writer.error is None
        assert writer.verify(session) == []
    found = FlushedWriter(session.blocks, 5)
    found.histories = {
        block: BlockHistory(contents, before.get(block, 0)) for block, contents in sent.items()
    }
    with NbdSession(url_at(two, "gateway2", "stamped@s"), 5) as snapshot:
        assert found.verify(snapshot) == []


def test_guest_hardly_waits_for_a_snapshot(two: DevCluster) -> None:
    two.create("steady", "64M")
    waited = []
    with (
        NbdSession(url_at(two, "gateway1", "steady"), 6) as session,
        SteadyLoad(session, 6) as load,
    ):
        for number in range(5):
            load.settle(0.5, 30)
            load.begin()
            take(two, f"steady@{number}")
            load.settle(0.5, 30)
            waited.append(load.worst_s)
        load.stop()
        assert load.errors == []
    print(f"the longest waits: {[f'{each * 1000:.0f} ms' for each in waited]}")
    assert max(waited) < STALL_S


def test_snapshot_of_a_closed_image_is_what_it_held(two: DevCluster, tmp_path: Path) -> None:
    two.create("closed", "8M")
    first, second = os.urandom(8 * MIB), os.urandom(8 * MIB)
    write_at(url_at(two, "gateway2", "closed"), first, tmp_path / "content")
    closed(two, "closed")
    taken = take(two, "closed@first")
    closed(two, "closed")
    assert two.info("closed")["clean"] is True
    assert taken["size_bytes"] == 8 * MIB
    write_at(url_at(two, "gateway1", "closed"), second, tmp_path / "content")
    take(two, "closed@second")
    assert copied(url_at(two, "gateway1", "closed@first"), tmp_path / "a") == first
    assert copied(url_at(two, "gateway2", "closed@second"), tmp_path / "b") == second
    assert [each["name"] for each in two.json("snapshot", "ls", f"{POOL}/closed")] == [
        f"{POOL}/closed@first",
        f"{POOL}/closed@second",
    ]
    info = two.json("snapshot", "info", f"{POOL}/closed@first")
    assert (info["layers"], info["created_at"]) == ([1], taken["created_at"])
    assert [each["name"] for each in two.info("closed")["snapshots"]] == ["first", "second"]


def test_snapshot_of_an_image_that_was_never_opened_is_zeroes(
    two: DevCluster, tmp_path: Path
) -> None:
    two.create("fresh", "1M")
    take(two, "fresh@s")
    assert copied(url_at(two, "gateway2", "fresh@s"), tmp_path / "zeroes") == bytes(MIB)


def test_image_after_a_snapshot_grows_and_shrinks_and_the_snapshot_does_not(
    two: DevCluster, tmp_path: Path
) -> None:
    two.create("sized", "8M")
    content = os.urandom(8 * MIB)
    uri = url_at(two, "gateway1", "sized")
    write_at(uri, content, tmp_path / "content")
    closed(two, "sized")
    take(two, "sized@s")
    two.hci("image", "resize", f"{POOL}/sized", "4M", "--force")
    closed(two, "sized")
    two.hci("image", "resize", f"{POOL}/sized", "12M")
    assert copied(uri, tmp_path / "now") == content[: 4 * MIB] + bytes(8 * MIB)
    for gateway in two.gateways:
        assert copied(url_at(two, gateway, "sized@s"), tmp_path / "then") == content
    closed(two, "sized")
    take(two, "sized@larger")
    assert two.check("sized")["equal"]


def test_snapshot_is_read_only_over_nbd(two: DevCluster) -> None:
    two.create("kept", "1M")
    take(two, "kept@s")
    uri = url_at(two, "gateway1", "kept@s")
    said = subprocess.run(["nbdinfo", "--json", uri], capture_output=True, check=True).stdout
    export = json.loads(said)["exports"][0]
    assert (export["is_read_only"], export["export-size"]) == (True, MIB)
    done = subprocess.run(
        ["qemu-io", "-f", "raw", "-c", "write 0 4k", uri], capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "Permission denied" in done.stderr


def test_snapshots_that_cannot_be_taken_or_read_are_refused_in_one_line(two: DevCluster) -> None:
    two.create("odd", "1M")
    take(two, "odd@s")
    create = ("snapshot", "create")
    assert "has a snapshot s already" in is_refused(two, *create, f"{POOL}/odd@s")
    assert "there is no image vms/no" in is_refused(two, *create, f"{POOL}/no@s")
    assert "there is no pool no" in is_refused(two, *create, "no/odd@s")
    assert "names no snapshot: write POOL/IMAGE@NAME" in is_refused(two, *create, f"{POOL}/odd")
    assert "has a slash" in is_refused(two, *create, f"{POOL}/odd@a/b")
    assert "is empty" in is_refused(two, *create, f"{POOL}/odd@")
    assert "means a folder" in is_refused(two, *create, f"{POOL}/odd@..")
    assert "has 256 bytes" in is_refused(two, *create, f"{POOL}/odd@{'x' * 256}")
    assert "'@'" in is_refused(two, *create, f"{POOL}/odd@a@b")
    no_such = f"{POOL}/odd has no snapshot t; `hci snapshot ls {POOL}/odd`"
    for command in (
        ("snapshot", "info", f"{POOL}/odd@t"),
        ("image", "export", f"{POOL}/odd@t", "/dev/null"),
        ("image", "url", f"{POOL}/odd@t"),
    ):
        assert no_such in is_refused(two, *command)
    assert "it has 1 snapshot (s); remove it with `hci" in is_refused(
        two, "image", "rm", f"{POOL}/odd"
    )
    assert "snapshots" in is_refused(two, "image", "resize", f"{POOL}/odd@s", "2M")
    said = subprocess.run(
        ["nbdinfo", url_at(two, "gateway2", "odd@t")], capture_output=True, text=True
    )
    assert "No such file or directory for export: vms/odd@t" in said.stderr


def test_image_is_removed_with_its_snapshots_and_who_reads_one_gets_errors(
    two: DevCluster,
) -> None:
    two.create("going", "8M")
    with NbdSession(url_at(two, "gateway1", "going"), 1) as session:
        session.call("write", 0, 64, 1)
        take(two, "going@s")
        take(two, "going@t")
    with NbdSession(url_at(two, "gateway2", "going@s"), 1) as reader:
        assert reader.call("read", 0, 64) == [1] * 64
        assert "it has 2 snapshots (s, …)" in is_refused(two, "image", "rm", f"{POOL}/going")
        two.hci("image", "rm", f"{POOL}/going", "--with-snapshots")

        # Its gateway hears of it a moment later.
        def is_over() -> bool:
            try:
                assert reader.call("read", 0, 64) == [1] * 64
            except NbdError:
                return True
            return False

        until("its reader is sent away", is_over)
    assert not any("going" in each["name"] for each in two.json("snapshot", "ls"))
    with pytest.raises(NbdError):
        NbdSession(url_at(two, "gateway2", "going@s"), 1)
    two.await_health("ok")


def test_name_of_any_characters_is_taken_and_read(two: DevCluster, tmp_path: Path) -> None:
    two.create("named", "1M")
    name = "vor dem Update é#?%\U0001f600"
    take(two, f"named@{name}")
    uri = two.hci("image", "url", f"{POOL}/named@{name}").strip()
    assert copied(uri, tmp_path / "content") == bytes(MIB)


def test_image_with_as_many_snapshots_as_there_may_be_refuses_one_more(two: DevCluster) -> None:
    two.create("full", "1M")
    with NbdSession(url_at(two, "gateway1", "full"), 1) as session:
        for number in range(256):
            session.call("write", 0, 1, number + 1)
            take(two, f"full@{number}")
        assert "no more than that" in is_refused(two, "snapshot", "create", f"{POOL}/full@256")
        assert session.call("read", 0, 1) == [256]
    with NbdSession(url_at(two, "gateway2", "full@7"), 1) as session:
        assert session.call("read", 0, 1) == [8]
    listed = two.json("snapshot", "ls", f"{POOL}/full")
    assert [each["name"] for each in listed] == [f"{POOL}/full@{n}" for n in range(256)]
