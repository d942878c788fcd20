"""Stock NBD clients against a gateway: what they write is there, whoever reads it."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path

import pytest

from tests.devcluster import POOL, DevCluster
from tests.faults.load import SIZE_MIB, VerifyingFio


def run(*command: str) -> str:
    """Runs a client to its end; it must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def test_nbdinfo_finds_what_qemu_needs(shared: DevCluster) -> None:
    shared.create("look", "64M")
    found = json.loads(run("nbdinfo", "--json", shared.url("look")))["exports"][0]
    assert found["export-name"] == f"{POOL}/look"
    assert found["export-size"] == 64 << 20
    for ability in ("can_flush", "can_fua", "can_trim", "can_zero", "can_multi_conn"):
        assert found[ability], ability
    assert not found["is_read_only"]


def test_nbdinfo_list_names_every_image(shared: DevCluster) -> None:
    shared.create("listed/one", "1M")
    shared.create("listed/two", "1M")
    socket = shared.gateway_socket("gateway1")
    listed = json.loads(run("nbdinfo", "--list", "--json", f"nbd+unix:///?socket={socket}"))
    names = {export["export-name"] for export in listed["exports"]}
    assert {f"{POOL}/listed/one", f"{POOL}/listed/two"} <= names


def test_nbdcopy_in_and_out_is_equal(shared: DevCluster, tmp_path: Path) -> None:
    source = tmp_path / "source"
    content = random.Random(3).randbytes(20 << 20) + bytes(12 << 20)
    source.write_bytes(content)
    shared.create("copied", "32M")
    run("nbdcopy", "--flush", str(source), shared.url("copied"))
    back = tmp_path / "back"
    run("nbdcopy", shared.url("copied"), str(back))
    assert back.read_bytes() == content


def test_nbdcopy_of_an_empty_image_sees_one_hole(shared: DevCluster) -> None:
    shared.create("hollow", "1G")
    mapped = json.loads(run("nbdinfo", "--map", "--json", shared.url("hollow")))
    assert {extent["type"] for extent in mapped} == {3}
    assert sum(extent["length"] for extent in mapped) == 1 << 30


@pytest.mark.parametrize(
    ("image", "first", "second", "check"),
    [
        ("pattern-1", "write -P 0x5a 0 64k", "write -P 0xa5 1 510", "read -P 0xa5 1 510"),
        (
            "pattern-2",
            "write -P 0x5a 4190208 8192",
            "write -P 0xa5 4194300 9",
            "read -P 0xa5 4194300 9",
        ),
        ("pattern-3", "write -P 0x5a 0 8M", "write -z 12345 1M", "read -P 0 12345 1M"),
        ("pattern-4", "write -P 0x5a 0 8M", "discard 4M 4M", "read -P 0 4M 4M"),
        ("pattern-5", "write -P 0x5a 0 16M", "write -z -u 0 16M", "read -P 0 0 16M"),
        ("pattern-6", "write -f -P 0x5a 0 32M", "flush", "read -P 0x5a 0 32M"),
    ],
)
def test_qemu_io_pattern_is_read_back(
    shared: DevCluster, image: str, first: str, second: str, check: str
) -> None:
    shared.create(image, "32M")
    uri = shared.url(image)
    run("qemu-io", "-f", "raw", "-d", "unmap", "-c", first, "-c", second, "-c", check, uri)
    # Again over a session of its own, after the image was closed in between.
    said = run("qemu-io", "-f", "raw", "-c", check, uri)
    assert "Pattern verification failed" not in said


def test_discarded_space_is_given_back(shared: DevCluster) -> None:
    shared.create("freed", "64M")
    uri = shared.url("freed")
    run("qemu-io", "-f", "raw", "-c", "write -P 1 0 32M", "-c", "write -P 1 32M 32M", uri)
    before = shared.info("freed")["used_bytes"]
    run("qemu-io", "-f", "raw", "-d", "unmap", "-c", "discard 0 32M", "-c", "flush", uri)
    after = shared.info("freed")["used_bytes"]
    for node, used in before.items():
        assert used >= 64 << 20
        assert after[node] <= used - (30 << 20), (before, after)


def test_fio_verify_with_fsync_passes(shared: DevCluster, tmp_path: Path) -> None:
    shared.create("fio", f"{SIZE_MIB}M")
    with VerifyingFio(shared.url("fio"), 11, tmp_path) as fio:
        fio.finish()
    shared.must_be_equal("fio")


def test_many_images_at_once_through_one_gateway_do_not_mix(shared: DevCluster) -> None:
    clients = []
    for number in range(1, 9):
        shared.create(f"many-{number}", "8M")
        fill = ["-c", f"write -P {number} 0 8M", "-c", "flush", "-c", f"read -P {number} 0 8M"]
        clients.append(
            subprocess.Popen(
                ["qemu-io", "-f", "raw", *fill, shared.url(f"many-{number}")],
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    for client in clients:
        said, _ = client.communicate(timeout=60)
        assert client.returncode == 0
        assert "failed" not in said
    for number in range(1, 9):
        run("qemu-io", "-f", "raw", "-c", f"read -P {number} 0 8M", shared.url(f"many-{number}"))
