"""Two nodes and an arbiter on a third host: the same playbook, and a node that dies."""

from __future__ import annotations

import json

from tests.deploy.disk import WrittenDisk
from tests.deploy.hosts import Hosts
from tests.deploy.playbook import Controller
from tests.waiting import until

HEAL_S = 120.0


def health(hosts: Hosts) -> str:
    return str(json.loads(hosts.run("host1", "hci status --json"))["health"])


def test_image_is_written_while_one_of_two_nodes_dies(hosts: Hosts, controller: Controller) -> None:
    inventory = controller.inventory("two-nodes-and-arbiter")
    controller.play("site", inventory).must_succeed()
    played = controller.play("site", inventory).must_succeed()
    assert played.changed == {"host1": 0, "host2": 0, "host3": 0}
    assert json.loads(hosts.run("host3", "hci pool ls --json"))[0]["arbiter"] == "host3"
    hosts.run("host1", "hci image create vms/pair 1G")
    with WrittenDisk(hosts, "host1", "vms/pair") as disk:
        disk.go_on(20)
        hosts.kill("host2")
        disk.go_on(60)
        hosts.boot("host2")
        until("it is healed", lambda: health(hosts) == "ok", HEAL_S)
        disk.finish()
    hosts.run("host1", "hci image check vms/pair")
