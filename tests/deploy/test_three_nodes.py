"""Three hosts, from nothing to a cluster under load, by docs/deploy.md word for word.

The tests of this file follow each other: each goes on with what the one before has left.
"""

from __future__ import annotations

import json
import re
import time

import pytest

from tests.deploy.disk import WrittenDisk
from tests.deploy.hosts import PROJECT, Hosts
from tests.deploy.playbook import Controller
from tests.waiting import until

HEAL_S = 120.0
UNITS = ("hci-node", "hci-gateway", "hci-etcd")


def blocks() -> dict[str, str]:
    """The commands of docs/deploy.md, by the heading that they stand below."""
    text = (PROJECT / "docs" / "deploy.md").read_text()
    found = {}
    for section in text.split("\n## ")[1:]:
        code = re.findall(r"^```sh\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
        if code:
            (found[section.splitlines()[0]],) = code
    return found


def health(hosts: Hosts, host: str = "host1") -> str:
    return str(json.loads(hosts.run(host, "hci status --json"))["health"])


def must_be_well(hosts: Hosts) -> None:
    until("all is well", lambda: health(hosts) == "ok", HEAL_S)
    hosts.run("host1", "hci image check vms/scratch")


def test_commands_of_the_page_are_these() -> None:
    assert list(blocks()) == [
        "The bundle", "The inventory", "The cluster", "An image", "Away with it"
    ]  # fmt: skip
    # What `make test-deploy` has done, but for the clone.
    assert "make bundle\n" in blocks()["The bundle"]


def test_page_leads_from_fresh_hosts_to_an_image(hosts: Hosts, controller: Controller) -> None:
    controller.run(blocks()["The inventory"], PROJECT).must_succeed()
    inventory = controller.folder / "cluster.yml"
    assert str(controller.bundle) in inventory.read_text()
    inventory.write_text(controller.filled_in(inventory.read_text()))
    controller.run(blocks()["The cluster"]).must_succeed()
    hosts.run("host1", "qemu-img create -q -f qcow2 /root/disk.qcow2 64M")
    hosts.run("host1", "qemu-io -c 'write -P 7 1M 3M' /root/disk.qcow2")
    said = hosts.run("host1", f"set -e\n{blocks()['An image']}")
    assert "is well" in said
    assert "virtual size: 64 MiB" in said
    read = "qemu-io -f raw -c 'read -P 7 1M 3M' -c 'read -P 0 0 1M' \"$(hci image url vms/web)\""
    assert "failed" not in hosts.run("host2", read), "through the gateway of another host"


def test_second_run_changes_nothing(controller: Controller) -> None:
    inventory = controller.folder / "cluster.yml"
    played = controller.play("site", inventory).must_succeed()
    assert played.changed == {"host1": 0, "host2": 0, "host3": 0}
    played = controller.play("site", inventory, "--check").must_succeed()
    assert played.changed == {"host1": 0, "host2": 0, "host3": 0}


def test_daemons_are_confined(hosts: Hosts) -> None:
    address = hosts.addresses["host1"]
    listening = hosts.run("host1", "ss --listening --tcp --numeric --no-header").split("\n")
    ours = {line.split()[3] for line in listening if line and not line.split()[3].endswith(":22")}
    ports = {place.rpartition(":")[2] for place in ours}
    assert {"2379", "2380", "7101", "7201", "7301"} == ports
    assert {place.rpartition(":")[0].strip("[]").removeprefix("::ffff:") for place in ours} == {
        address
    }
    assert hosts.run("host1", "stat -c '%U %G %a' /run/hci/nbd.sock") == "root kvm 660\n"
    assert hosts.run("host1", "stat -c '%U %G %a' /etc/hci/hci.toml") == "root hci 640\n"
    assert hosts.run("host1", "stat -c '%U %a' /var/lib/hci/node") == "hci 700\n"
    for unit in UNITS:
        shown = hosts.run("host1", f"systemctl show -p User,CapabilityBoundingSet {unit}")
        assert "CapabilityBoundingSet=\n" in shown
        assert f"User={'etcd' if unit == 'hci-etcd' else 'hci'}\n" in shown
        pid = hosts.run("host1", f"systemctl show -P MainPID {unit}").strip()
        status = hosts.run("host1", f"cat /proc/{pid}/status")
        assert "NoNewPrivs:\t1\n" in status
        assert "CapEff:\t0000000000000000\n" in status
        # In its own view of the files it may write to its own folder, and not to the system's.
        hosts.run("host1", f"nsenter -t {pid} -m -- sh -c '! touch /usr/x && ! touch /etc/x'")


def test_image_is_written_while_a_host_dies_and_comes_back(hosts: Hosts) -> None:
    with WrittenDisk(hosts, "host1", "vms/scratch") as disk:
        disk.go_on(20)
        hosts.kill("host2")
        disk.go_on(60)
        assert health(hosts) == "degraded"
        hosts.boot("host2")
        disk.go_on(60)
        until("it is healed", lambda: health(hosts) == "ok", HEAL_S)
        disk.finish()
    must_be_well(hosts)


def test_gateway_restarts_under_its_client(hosts: Hosts) -> None:
    with WrittenDisk(hosts, "host1", "vms/scratch") as disk:
        for command in (
            "systemctl restart hci-gateway",
            "systemctl kill --kill-whom=main --signal=KILL hci-gateway",
        ):
            disk.go_on(20)
            hosts.run("host1", command)
        disk.go_on(20)
        disk.finish()
    must_be_well(hosts)


def test_gateway_that_hangs_is_replaced_under_its_client(hosts: Hosts) -> None:
    """A stopped gateway would have its guests wait for ever."""
    settings = "/run/systemd/system/hci-gateway.service.d"
    hosts.run("host1", f"mkdir -p {settings} && printf '[Service]\\nWatchdogSec=12s\\n' "
              f">{settings}/quick.conf && systemctl daemon-reload && "
              "systemctl restart hci-gateway")  # fmt: skip
    with WrittenDisk(hosts, "host1", "vms/scratch") as disk:
        disk.go_on(20)
        hosts.run("host1", "systemctl kill --kill-whom=main --signal=STOP hci-gateway")
        disk.go_on(60)
        disk.finish()
    logged = hosts.run("host1", "journalctl -u hci-gateway -n 100 --no-pager")
    assert "Watchdog timeout" in logged
    hosts.run("host1", f"rm -r {settings} && systemctl daemon-reload")
    must_be_well(hosts)


def started(hosts: Hosts, unit: str) -> dict[str, float]:
    """When a unit of each host began to run, in seconds since the kernel began, as all share it."""
    found = {}
    for name in hosts.addresses:
        said = hosts.run(name, f"systemctl show -P ActiveEnterTimestampMonotonic {unit}")
        found[name] = int(said) / 1e6
    return found


def test_change_restarts_one_host_at_a_time_under_a_client(
    hosts: Hosts, controller: Controller
) -> None:
    before = {unit: started(hosts, unit) for unit in UNITS}
    inventory = controller.folder / "cluster.yml"
    changes = ["--extra-vars", "hci_host_metrics=true", "--extra-vars", "hci_etcd_weight=900"]
    began_s = time.monotonic()
    with WrittenDisk(hosts, "host1", "vms/scratch") as disk:
        disk.go_on(20)
        played = controller.play("site", inventory, *changes).must_succeed()
        disk.go_on(20)
        disk.finish()
    assert all(played.changed.values())
    for unit in UNITS:
        after = started(hosts, unit)
        assert all(after[name] > max(before[unit][name], began_s) for name in after), unit
        assert len({round(moment, 1) for moment in after.values()}) == 3, f"{unit}: {after}"
    nodes, gateways = started(hosts, "hci-node"), started(hosts, "hci-gateway")
    assert list(nodes.values()) == sorted(nodes.values())
    assert max(nodes.values()) < min(gateways.values())
    url = f"http://{hosts.addresses['host2']}:9701/metrics"
    asked = f"import urllib.request as u; print(u.urlopen('{url}').read().decode())"
    assert "hci_node_up 1.0" in hosts.run("host1", f'python3 -c "{asked}"')
    must_be_well(hosts)


@pytest.mark.parametrize("answer", [None, "yes"])
def test_teardown_is_refused_without_the_clusters_id(
    hosts: Hosts, controller: Controller, answer: str | None
) -> None:
    inventory = controller.folder / "cluster.yml"
    said = [] if answer is None else ["--extra-vars", f"hci_teardown={answer}"]
    controller.play("teardown", inventory, *said).must_refuse("nothing was changed")
    assert health(hosts) == "ok"


def test_teardown_leaves_nothing(hosts: Hosts, controller: Controller) -> None:
    inventory = controller.folder / "cluster.yml"
    (own_id,) = re.findall(r"hci_cluster_id: (\w+)", inventory.read_text())
    said = ["--extra-vars", f"hci_teardown={own_id}"]
    controller.play("teardown", inventory, *said).must_succeed()
    for name in hosts.addresses:
        hosts.run(
            name, "! ls -d /etc/hci /opt/hci-vmstore /var/lib/hci* /run/hci /usr/local/bin/hci"
        )
        hosts.run(name, "! ls -d /etc/systemd/system/hci-* && ! getent passwd hci")
        hosts.run(name, "! pgrep --full /opt/hci-vmstore/[c]urrent && ! pgrep --exact etcd")
    # Again, there is nothing to do.
    played = controller.play("teardown", inventory, *said).must_succeed()
    assert set(played.changed.values()) == {0}
