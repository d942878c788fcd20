"""What cannot work is refused before anything is changed, in words that say what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.hosts import Hosts
from tests.deploy.playbook import Controller

Inventory = dict[str, Any]


def edited(controller: Controller, name: str, edit: Callable[[Inventory], object]) -> Path:
    """An example of an inventory, filled in, then changed in one respect."""
    found = yaml.safe_load(controller.inventory(name).read_text())
    edit(found["hci"])
    path = controller.folder / "edited.yml"
    path.write_text(yaml.safe_dump(found))
    return path


def named_badly(hci: Inventory) -> None:
    nodes = hci["children"]["hci_nodes"]["hosts"]
    nodes["Host_2"] = nodes.pop("host2")


def two_members(hci: Inventory) -> None:
    hci["children"]["hci_etcd"] = {"hosts": {"host1": None, "host2": None}}


def too_few_nodes(hci: Inventory) -> None:
    nodes = hci["children"]["hci_nodes"]["hosts"]
    hci["children"]["hci_etcd"] = {"hosts": {"host3": nodes.pop("host3"), "host1": {}, "host2": {}}}


def two_arbiters(hci: Inventory) -> None:
    hci["children"]["hci_arbiters"]["hosts"]["host1"] = None


def arbiter_on_a_node(hci: Inventory) -> None:
    hci["children"]["hci_nodes"]["hosts"]["host3"] = None


def same_address(hci: Inventory) -> None:
    nodes = hci["children"]["hci_nodes"]["hosts"]
    nodes["host2"]["hci_address"] = nodes["host1"]["hci_address"]


def foreign_address(hci: Inventory) -> None:
    hci["children"]["hci_nodes"]["hosts"]["host2"]["hci_address"] = "192.0.2.77"


def without(name: str) -> Callable[[Inventory], object]:
    return lambda hci: hci["vars"].pop(name)


def having(name: str, value: str) -> Callable[[Inventory], object]:
    return lambda hci: hci["vars"].update({name: value})


THREE, TWO = "three-nodes", "two-nodes-and-arbiter"
INVENTORIES = {
    "a name with capitals": (THREE, named_badly, "Host_2 is no name of a member"),
    "an even number of etcd members": (THREE, two_members, "hci_etcd has 2 hosts"),
    "two nodes without an arbiter": (THREE, too_few_nodes, "hci_nodes has 2 hosts"),
    "two arbiters": (TWO, two_arbiters, "hci_arbiters has 2 hosts"),
    "an arbiter on a node": (TWO, arbiter_on_a_node, "the arbiter stands on the host of a node"),
    "one address for two hosts": (THREE, same_address, "two hosts have the same hci_address"),
    "an address of no host": (THREE, foreign_address, "hci_address = 192.0.2.77 is none of host2"),
    "no id": (THREE, without("hci_cluster_id"), "missing required arguments: hci_cluster_id"),
    "an id that is none": (THREE, having("hci_cluster_id", "mine"), "openssl rand -hex 16"),
    "no bundle": (THREE, having("hci_bundle", "/nowhere/b.tar.gz"), "`make bundle` writes one"),
}


@pytest.mark.parametrize("what", INVENTORIES)
def test_inventory_that_cannot_work_is_refused(controller: Controller, what: str) -> None:
    example, edit, why = INVENTORIES[what]
    controller.play("site", edited(controller, example, edit)).must_refuse(why)


@pytest.fixture
def undone(hosts: Hosts) -> Iterator[list[str]]:
    """Commands that put host2 back to what it was."""
    commands: list[str] = []
    yield commands
    for command in commands:
        hosts.run("host2", command)


def test_another_system_is_refused(hosts: Hosts, controller: Controller, undone: list[str]) -> None:
    hosts.run("host2", "cp -a --dereference /etc/os-release /etc/debian_version /root")
    undone += [
        "ln -sf ../usr/lib/os-release /etc/os-release",
        "cp -a /root/debian_version /etc/debian_version",
    ]
    hosts.run(
        "host2",
        "rm /etc/os-release && sed s/12/11/g /root/os-release >/etc/os-release && "
        "echo 11.9 >/etc/debian_version",
    )
    refused = controller.play("site", controller.inventory(THREE))
    refused.must_refuse("host2 is Debian 11.9 on x86_64 with systemd: this version supports")


def test_clock_that_is_wrong_is_refused(
    hosts: Hosts, controller: Controller, undone: list[str]
) -> None:
    # The kernel's clock is the same for all hosts here, so one of them is told another time.
    undone.append("rm /usr/local/bin/date")
    hosts.run(
        "host2",
        'printf \'#!/bin/sh\\nexec /bin/date -d "1 hour ago" "$@"\\n\' >/usr/local/bin/date && '
        "chmod 755 /usr/local/bin/date",
    )
    refused = controller.play("site", controller.inventory(THREE))
    refused.must_refuse("the clock of host2 is about -3")


def test_too_little_space_is_refused(
    hosts: Hosts, controller: Controller, undone: list[str]
) -> None:
    undone.append("umount /var/lib/hci && rmdir /var/lib/hci")
    hosts.run("host2", "mkdir /var/lib/hci && mount -t tmpfs -o size=64M none /var/lib/hci")
    refused = controller.play("site", controller.inventory(THREE))
    refused.must_refuse("host2 has 64.00 MB free at /var/lib/hci for its store, less than 20.00 GB")


def test_host_of_another_cluster_is_refused(
    hosts: Hosts, controller: Controller, undone: list[str]
) -> None:
    undone.append("rm -r /etc/hci")
    other = "f" * 32
    hosts.run("host2", f"mkdir /etc/hci && echo 'id = \"{other}\"' >/etc/hci/hci.toml")
    refused = controller.play("site", controller.inventory(THREE))
    refused.must_refuse("/etc/hci/hci.toml of host2 names another cluster")


def test_check_on_fresh_hosts_says_what_would_change_and_changes_nothing(
    hosts: Hosts, controller: Controller
) -> None:
    played = controller.play("site", controller.inventory(THREE), "--check").must_succeed()
    assert all(count > 10 for count in played.changed.values()), played.changed
    for name in hosts.addresses:
        hosts.run(name, "! ls -d /etc/hci /opt/hci-vmstore /var/lib/hci* /etc/systemd/system/hci-*")
        hosts.run(name, "! getent passwd hci")
