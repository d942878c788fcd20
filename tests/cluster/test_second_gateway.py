"""Two gateways: one writer per image; looking at an image takes no lease."""

from __future__ import annotations

import json
import subprocess
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.devcluster import POOL, DevCluster
from tests.faults.nbd_session import NbdError, NbdSession
from tests.waiting import until

CLOSING_TIMEOUT_S = 60.0
CHECK = ("check", f"{POOL}/elsewhere")


@pytest.fixture(scope="module")
def two() -> Iterator[DevCluster]:
    """A cluster with two gateways, for all tests of this module."""
    with DevCluster(gateways=2) as started:
        yield started


def nbdinfo(*arguments: str) -> object:
    """What nbdinfo says, as JSON."""
    done = subprocess.run(
        ["nbdinfo", "--json", *arguments], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def open_when_free(cluster: DevCluster, gateway: str, image: str) -> NbdSession:
    """Opens an image whose last client has just left another gateway."""
    deadline = time.monotonic() + CLOSING_TIMEOUT_S
    while True:
        try:
            return NbdSession(cluster.url_at(gateway, image), 1)
        except NbdError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def test_second_gateway_is_refused_with_the_holders_name(two: DevCluster) -> None:
    two.create("held", "16M")
    with NbdSession(two.url_at("gateway1", "held"), 1) as session:
        session.call("write", 0, 4, 1)
        done = subprocess.run(
            ["qemu-io", "-f", "raw", "-c", "read 0 4k", two.url_at("gateway2", "held")],
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert done.returncode != 0
        assert "gateway1" in done.stderr
        # The holder was not disturbed.
        session.call("write", 4, 4, 2)
        assert session.call("read", 0, 8) == [1] * 4 + [2] * 4


def test_export_at_the_host_of_another_gateway_names_the_holder(
    two: DevCluster, tmp_path: Path
) -> None:
    # Of what QEMU says the first line was shown, which has an option's number and no reason.
    two.create("elsewhere", "16M")
    gateways = two.config.read_text().split("[gateway.gateway2]")
    host1 = tmp_path / "host1.toml"
    host1.write_text(gateways[0])
    with NbdSession(two.url_at("gateway2", "elsewhere"), 1) as session:
        session.call("write", 0, 4, 1)
        for command in (("export", f"{POOL}/elsewhere", str(tmp_path / "out.raw")), CHECK):
            done = two.try_hci("--config", str(host1), "image", *command)
            assert done.returncode == 1
            assert "is in use on gateway gateway2" in done.stderr, done.stderr
            assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == [host1]


def test_image_closed_at_one_gateway_opens_at_the_other(two: DevCluster) -> None:
    two.create("moved", "16M")
    with NbdSession(two.url_at("gateway1", "moved"), 1) as session:
        session.call("write", 0, 16, 1)
    before = two.info("moved")["epoch"]
    with open_when_free(two, "gateway2", "moved") as session:
        assert session.call("read", 0, 16) == [1] * 16
        session.call("write", 0, 16, 2)
    with open_when_free(two, "gateway1", "moved") as session:
        assert session.call("read", 0, 16) == [2] * 16
    assert two.info("moved")["epoch"] > before
    two.must_be_equal("moved")


def test_looking_through_the_second_gateway_takes_no_lease(two: DevCluster) -> None:
    two.create("seen", "16M")
    epoch = two.info("seen")["epoch"]
    socket = two.gateway_socket("gateway2")
    nbdinfo("--list", f"nbd+unix:///?socket={socket}")
    assert two.info("seen")["epoch"] == epoch
    with NbdSession(two.url_at("gateway1", "seen"), 1) as session:
        nbdinfo("--list", f"nbd+unix:///?socket={socket}")
        session.call("write", 0, 1, 1)
        assert session.call("read", 0, 1) == [1]


def test_url_names_the_gateway_that_has_the_image_open(two: DevCluster) -> None:
    two.create("where", "16M")
    with NbdSession(two.url_at("gateway2", "where"), 1):
        assert two.gateway_socket("gateway2") in two.url("where")


def test_killed_gateways_image_opens_at_the_other_after_its_lease(two: DevCluster) -> None:
    two.create("orphan", "16M")
    session = NbdSession(two.url_at("gateway1", "orphan"), 1)
    session.call("write", 0, 16, 1)
    session.call("flush")
    two.kill("gateway1")
    session.close()
    try:
        deadline = time.monotonic() + CLOSING_TIMEOUT_S
        while True:
            try:
                with NbdSession(two.url_at("gateway2", "orphan"), 1) as second:
                    assert second.call("read", 0, 16) == [1] * 16
                    second.call("write", 0, 16, 2)
                break
            except NbdError:
                assert time.monotonic() < deadline, "the lease was never free"
                time.sleep(0.5)
    finally:
        two.run("gateway1")
    two.must_be_equal("orphan")
    assert f"{POOL}/orphan" in [image["name"] for image in two.json("image", "ls")]


def test_gateway_of_another_host_is_seen_with_what_it_has_open(
    two: DevCluster, tmp_path: Path
) -> None:
    # A host's configuration has its own members alone. What gateways of other hosts had open and
    # healed was unknown to it.
    two.create("far", "16M")
    sections = tomllib.loads(two.config.read_text())
    here = tmp_path / "host1.toml"
    parts = {
        "cluster": {key: sections["cluster"][key] for key in ("id", "etcd")},
        "gateway.gateway1": sections["gateway"]["gateway1"],
    }
    here.write_text(
        "".join(
            f"[{name}]\n" + "".join(f"{key} = {json.dumps(part[key])}\n" for key in part)
            for name, part in parts.items()
        )
    )

    def gateways() -> dict[str, Any]:
        listed = two.json("--config", str(here), "gateway", "ls")
        return {each["name"]: each for each in listed}

    with NbdSession(two.url_at("gateway2", "far"), 1) as session:
        session.call("write", 0, 4, 1)
        until("it is known", lambda: gateways()["gateway2"]["images"] == [f"{POOL}/far"])
        assert {each["state"] for each in gateways().values()} == {"up"}
    two.kill("gateway2")
    # Its lease lives for a while: until then it is said to run, and not to answer.
    assert gateways()["gateway2"]["state"] == "silent"
    told = two.json("--config", str(here), "status")["problems"]
    assert any("cannot be asked" in each["what"] for each in told), told
    until("its lease has ended", lambda: "gateway2" not in gateways())
    two.run("gateway2")
    until("it runs again", lambda: gateways().get("gateway2", {}).get("state") == "up")


def test_image_that_is_open_on_another_host_is_grown_from_here(
    two: DevCluster, tmp_path: Path
) -> None:
    # As on a host whose configuration has no gateway but its own.
    here = tmp_path / "here.toml"
    before, gateway2 = two.config.read_text().split("\n[gateway.gateway2]\n")
    here.write_text(before + "\n" + "".join(gateway2.partition("\n[")[1:]))
    assert "gateway2" not in tomllib.loads(here.read_text())["gateway"]
    two.create("guests", "16M")
    with NbdSession(two.url_at("gateway2", "guests"), 1) as session:
        session.call("write", 0, 4, 1)
        two.hci("--config", str(here), "image", "resize", f"{POOL}/guests", "32M")
        assert session.call("read", 0, 4) == [1] * 4
    assert two.info("guests")["size_bytes"] == 32 << 20
