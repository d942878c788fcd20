"""The command line: what it prints, and how it ends when it cannot."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
from typer.main import get_command

from etcd import keys
from etcd.interface import Delete, Put
from etcd.memory import MemoryEtcd
from etcd.records import ArbiterRecord, LostRecord
from hci import cli, config_file, connect
from hci.cli import app
from hci.dev import layout
from tests.unit.samples import node_record
from vmstore.catalog import Catalog
from vmstore.names import ImageName

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The configuration of a cluster in the test's folder."""
    path = tmp_path / "hci.toml"
    path.write_text(layout.new_config(tmp_path, 3, 2, "vms"))
    return path


@pytest.fixture
def empty_etcd(monkeypatch: pytest.MonkeyPatch) -> MemoryEtcd:
    """The verified fake in the place of the client."""
    memory = MemoryEtcd()
    monkeypatch.setattr(MemoryEtcd, "close", lambda _self: None)
    monkeypatch.setattr(connect, "EtcdClient", lambda _endpoints, **_options: memory)
    return memory


@pytest.fixture
def etcd(config: Path, empty_etcd: MemoryEtcd) -> MemoryEtcd:
    """The fake, holding the configured cluster, with three nodes that are up."""
    memory = empty_etcd
    catalog = Catalog(memory)
    catalog.init_cluster(config_file.load(config).cluster.id)
    for number in range(1, 4):
        catalog.announce_node(node_record(number), memory.grant_lease(60))
    catalog.create_pool("vms")
    return memory


@pytest.fixture
def hci(
    tmp_path: Path,
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """Runs a command against a configuration in the test's folder."""
    monkeypatch.setenv("HCI_CONFIG", str(config))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        printed = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, printed.out, printed.err

    return run


def test_version_is_that_of_the_engine(hci: Run) -> None:
    status, printed, _ = hci("--version")
    assert status == 0
    assert printed.startswith("hci 0.")


@pytest.mark.parametrize("arguments", [(), ("dev",), ("image", "import")])
def test_help_lists_what_there_is(hci: Run, arguments: tuple[str, ...]) -> None:
    status, printed, _ = hci(*arguments, "--help")
    assert status == 0
    assert "--install-completion" not in printed
    for word in {0: app.MODULES, 1: ("start", "kill"), 2: ("--format",)}[len(arguments)]:
        assert word in printed


@pytest.mark.usefixtures("etcd")
def test_heal_status_lists_stale_nodes(hci: Run, etcd: MemoryEtcd) -> None:
    """A group of one command was taken for that command."""
    image = Catalog(etcd).create_image(ImageName("vms", "web"), 1 << 30)
    stale = replace(image.record, generation=2, stale={0: {"node3": 1}})
    etcd.transaction([], [Put(image.key, stale.encode())])
    status, printed, _ = hci("heal", "status", "--json")
    (line,) = json.loads(printed)["images"]
    assert status == 0
    assert (line["image"], line["node"], line["state"]) == ("vms/web", "node3", "stale")


def test_heal_status_says_where_it_cannot_know_who_is_stale(hci: Run) -> None:
    # With etcd down it said that nothing is stale, which a script took for the end of a heal.
    status, printed, complaint = hci("heal", "status", "--json")
    assert (status, printed) == (1, "")
    assert "etcd is not reachable" in complaint


def test_image_on_a_node_that_is_not_registered_is_described(hci: Run, etcd: MemoryEtcd) -> None:
    # After a recovery that did not hear of a node the command ended with a traceback.
    Catalog(etcd).create_image(ImageName("vms", "web"), 1 << 30)
    etcd.transaction([], [Delete(keys.node("node2"))])
    status, printed, _ = hci("image", "info", "vms/web", "--json")
    assert status == 0
    assert json.loads(printed)["used_bytes"] == {}


def test_dev_start_with_another_configuration_starts_no_cluster(hci: Run, tmp_path: Path) -> None:
    # It passed over the configuration, and started the default cluster.
    path = tmp_path / "cluster.toml"
    path.write_text("nonsense")
    status, _, complaint = hci("--config", str(path), "dev", "start")
    assert status == 1
    assert "give the cluster's folder" in complaint
    assert not (tmp_path / "data").exists()


def test_command_with_a_typing_error_is_answered_with_the_right_one(hci: Run) -> None:
    assert "Did you mean 'status'" in hci("statsu")[2]


def test_dev_commands_that_ask_nobody_do_not_load_what_asks(tmp_path: Path) -> None:
    """gRPC alone takes as long to import as all that `hci dev kill` does."""
    program = "import sys, hci.cli.app, hci.cli.dev; print({'grpc', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("nonsense",), "No such command 'nonsense'"),
        (("image", "create", "vms/a"), "Missing argument 'size'"),
        (("pool", "rm"), "No such command 'rm'"),
        (("dev", "start", "--nodes", "x"), "Invalid value for '--nodes'"),
        (("dev", "start", "--nodes", "-1"), "Invalid value for '--nodes'"),
        (("dev", "start", "--gateways", "-2"), "Invalid value for '--gateways'"),
        (("pool", "create", "b", "--replica-sets", "0"), "Invalid value for '--replica-sets'"),
        (("pool", "create", "b", "--replica-sets", "-1"), "Invalid value for '--replica-sets'"),
        # The next word was taken for its value, and what was left for the command.
        (("image", "ls", "--config"), "Option '--config' requires an argument"),
        (("status", "--config", "--json"), "Option '--config' requires an argument"),
    ],
)
def test_wrong_usage_ends_with_2(hci: Run, arguments: tuple[str, ...], told: str) -> None:
    status, printed, complaint = hci(*arguments)
    assert (status, printed) == (2, "")
    assert f"Error: {told}" in complaint


def every_command() -> Iterator[tuple[str, ...]]:
    yield ()
    for module in app.MODULES:
        yield (module,)
        command = get_command(import_module(f"hci.cli.{module}").app)
        yield from ((module, name) for name in getattr(command, "commands", ()))


def test_help_shows_no_value_for_what_takes_none(hci: Run) -> None:
    # `--json <bool>`, it said, as if one had to write `--json true`.
    for names in every_command():
        status, printed, _ = hci(*names, "--help")
        assert status == 0
        assert "<bool>" not in printed, names
        assert "--no-" not in printed, names
        assert re.search(r"--help +Show this", printed), names


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("image", "create", "vms/a", "0"), "size of an image is zero"),
        (("image", "create", "vms/a", "ten"), "'ten' is not a size"),
        (("image", "create", "vms/a", "-5"), "'-5' is negative; sizes and counts are not"),
        (("image", "resize", "vms/there", "-1G"), "'-1G' is negative"),
        (("image", "create", "vms/a", "257T"), "beyond the limit of an image, 256 TiB"),
        (("image", "create", "vms/a", "1000"), "not a multiple of 512; the next larger is 1024"),
        (("image", "create", "vms", "1G"), "names no image: write POOL/NAME"),
        (("image", "create", "vms/a@b", "1G"), "has an '@', which is kept for snapshots"),
        (("image", "create", "none/a", "1G"), "there is no pool none; `hci pool ls`"),
        (("image", "create", "vms/there", "1G"), "vms/there exists already"),
        (("image", "info", "vms/none"), "there is no image vms/none; `hci image ls`"),
        (("image", "rm", "vms/none"), "there is no image vms/none"),
        (("image", "url", "vms/none"), "there is no image vms/none"),
        (("image", "ls", "none"), "there is no pool none"),
        (("image", "ls", "\udcff"), r"'\udcff' is not a pool name"),
        (("image", "resize", "vms/there", "512"), "use --force if that data is not needed"),
        (("image", "rm", "vms/there@s"), "has an '@', which is kept for snapshots"),
        (("image", "export", "vms/there@s", "/x.raw"), "vms/there has no snapshot s; `hci snap"),
        (("snapshot", "create", "vms/there"), "names no snapshot: write POOL/IMAGE@NAME"),
        (("snapshot", "create", "vms/none@s"), "there is no image vms/none"),
        (("snapshot", "create", "vms/there@"), "the snapshot name '' is empty"),
        (("snapshot", "create", "vms/there@\udcff"), "is not UTF-8"),
        (("snapshot", "create", "vms/there@s"), "gateway1 does not answer at"),
        (("snapshot", "rollback", "vms/there"), "names no snapshot: write POOL/IMAGE@NAME"),
        (("snapshot", "rollback", "vms/there@s"), "vms/there has no snapshot s; `hci snapshot ls"),
        (("snapshot", "info", "vms/there@s"), "vms/there has no snapshot s; `hci snapshot ls"),
        (("snapshot", "ls", "none"), "there is no pool none"),
        (("snapshot", "ls", "vms/none"), "there is no image vms/none"),
        (("image", "import", "/none.img", "vms/a"), "/none.img cannot be read: No such file"),
        (("image", "url", "vms/there", "--gateway", "gateway9"), "no [gateway.gateway9] in it"),
        (("pool", "create", "vms"), "the pool vms exists already"),
        (("pool", "set", "none", "--when-full", "stall"), "there is no pool none"),
        (("pool", "set", "\udcff", "--when-full", "stall"), r"'\udcff' is not a pool name"),
        (("pool", "create", "Bad"), "'Bad' is not a pool name"),
        (("pool", "create", "b", "--shard-size", "3M"), "is not a shard size: use 1M, 2M"),
        (("pool", "create", "b", "--failure-domain", "zone"), "needs 3 nodes on different zones"),
        (("pool", "create", "b", "--replica-sets", "1025"), "1 to 1024 replica sets, not 1025"),
        (("pool", "create", "b", "--policy", "thin-arbiter"), "needs an arbiter: name one with"),
        (
            ("pool", "create", "b", "--policy", "thin-arbiter", "--arbiter", "w"),
            "there is no arbiter w; `hci arbiter ls`",
        ),
        (("pool", "create", "b", "--arbiter", "w"), "replica-3 has no arbiter: leave w out"),
        (
            ("pool", "create", "b", "--policy", "thin-arbiter", "--arbiter", "\udcff"),
            r"'\udcff' is not an arbiter name",
        ),
        (("arbiter", "replace", "v", "w"), "there is no arbiter w"),
        (("arbiter", "replace", "v", "\udcff"), r"'\udcff' is not an arbiter name"),
        (("arbiter", "serve"), "say which arbiter with --name (known: none)"),
        (("dev", "kill", "node9"), "no member 'node9' in"),
        (("dev", "kill", "node1"), "node1 is not running; see `hci dev status`"),
        (("dev", "run", "node1"), "node1 needs etcd, which is not running: `hci dev run etcd`"),
        (("dev", "stop", "--dir", "/none"), "/none holds no cluster; `hci dev start /none` makes"),
        (("dev", "status", "/none"), "/none holds no cluster"),
        (("dev", "kill", "node1", "--dir", "/none"), "/none holds no cluster"),
        (("dev", "run", "all", "--dir", "/none"), "/none holds no cluster"),
        (("dev", "start", "/one", "--dir", "/two"), "/one and --dir /two are two folders"),
        (("status", "--config", "/none.toml"), "/none.toml: cannot be read: No such file"),
    ],
)
def test_bad_input_is_one_line_that_says_what_to_do(
    hci: Run, etcd: MemoryEtcd, arguments: tuple[str, ...], told: str
) -> None:
    Catalog(etcd).create_image(ImageName("vms", "there"), 1 << 30)
    status, printed, complaint = hci(*arguments)
    assert (status, printed) == (1, "")
    assert told in complaint
    assert complaint.startswith("hci: ")
    assert complaint.count("\n") == 1
    assert [str(entry.name) for entry in Catalog(etcd).images()] == ["vms/there"]


def test_image_that_is_created_is_listed_and_described(hci: Run, etcd: MemoryEtcd) -> None:
    assert hci("image", "create", "vms/a b", "1.5G")[:2] == (0, "created vms/a b, 1.5 GiB\n")
    assert "vms/a b" in hci("image", "ls")[1]
    (listed,) = json.loads(hci("image", "ls", "--json")[1])
    assert (listed["name"], listed["size_bytes"], listed["stale"]) == ("vms/a b", 3 << 29, [])
    found = json.loads(hci("image", "info", "vms/a b", "--json")[1])
    assert found["id"] == listed["id"]
    assert (found["epoch"], found["generation"], found["stale"]) == (0, 1, [])
    assert found["used_bytes"] == {}, "no node answers here"


def test_snapshots_are_listed_and_described(hci: Run, etcd: MemoryEtcd) -> None:
    catalog = Catalog(etcd)
    assert "no snapshots; take one with" in hci("snapshot", "ls")[1]
    image = catalog.create_image(ImageName("vms", "a"), 1 << 30)
    held = catalog.take_lease(image, gateway="g", holder="a" * 32, etcd_lease=etcd.grant_lease(9))
    for name in ("one", "two"):
        held = catalog.change(held, held.record.with_snapshot(name, 1_800_000_000))
    listed = json.loads(hci("snapshot", "ls", "vms", "--json")[1])
    assert [each["name"] for each in listed] == ["vms/a@one", "vms/a@two"]
    assert json.loads(hci("snapshot", "ls", "vms/a", "--json")[1]) == listed
    assert "vms/a@two  1 GiB" in hci("snapshot", "ls")[1]
    info = json.loads(hci("snapshot", "info", "vms/a@two", "--json")[1])
    assert info == {
        "name": "vms/a@two",
        "size_bytes": 1 << 30,
        "created_at": 1_800_000_000,
        "image_id": image.record.id,
        "layers": [2, 1],
        "generation": 3,
        "clones": [],
    }
    assert "layers      2, 1" in hci("snapshot", "info", "vms/a@two")[1]
    found = json.loads(hci("image", "info", "vms/a", "--json")[1])
    assert [each["name"] for each in found["snapshots"]] == ["one", "two"]
    assert "snapshots     one, two" in hci("image", "info", "vms/a")[1]
    assert hci("image", "url", "vms/a@one")[1].startswith("nbd+unix:///vms/a%40one?socket=")


def test_image_that_grows_keeps_its_id(hci: Run, etcd: MemoryEtcd) -> None:
    hci("image", "create", "vms/a", "1G")
    before = json.loads(hci("image", "ls", "--json")[1])[0]
    assert hci("image", "resize", "vms/a", "2G")[:2] == (0, "vms/a has 2 GiB now\n")
    after = json.loads(hci("image", "ls", "--json")[1])[0]
    assert (after["id"], after["size_bytes"]) == (before["id"], 2 << 30)


def test_image_that_is_removed_is_gone(hci: Run, etcd: MemoryEtcd) -> None:
    hci("image", "create", "vms/a", "1G")
    assert hci("image", "rm", "vms/a")[0] == 0
    assert json.loads(hci("image", "ls", "vms", "--json")[1]) == []


def test_url_names_socket_and_image_percent_encoded(hci: Run, etcd: MemoryEtcd) -> None:
    hci("image", "create", "vms/ä b", "1G")
    printed = hci("image", "url", "vms/ä b")[1]
    assert printed.startswith("nbd+unix:///vms/%C3%A4%20b?socket=/")
    assert printed.endswith("/gateway1/nbd.sock\n")
    assert hci("image", "url", "vms/ä b", "--tcp")[1].startswith("nbd://127.0.0.1:")


def test_pool_listing_has_its_policy(hci: Run, etcd: MemoryEtcd) -> None:
    assert hci("pool", "create", "fast", "--shard-size", "1M", "--replica-sets", "2")[0] == 0
    fast, vms = json.loads(hci("pool", "ls", "--json")[1])
    assert (fast["name"], fast["shard_bytes"], fast["replica_sets"]) == ("fast", 1 << 20, 2)
    assert (vms["name"], vms["policy"], vms["failure_domain"]) == ("vms", "replica-3", "host")


def test_nodes_that_do_not_answer_are_listed_as_down(hci: Run, etcd: MemoryEtcd) -> None:
    nodes = json.loads(hci("node", "ls", "--json")[1])
    assert [(node["name"], node["state"]) for node in nodes] == [
        ("node1", "down"),
        ("node2", "down"),
        ("node3", "down"),
    ]
    assert set(nodes[0]) == {
        *("name", "state", "address", "zone", "data_dir", "capacity_bytes", "used_bytes"),
        "unknown_bytes",
    }


def test_status_of_a_cluster_that_is_down_says_what_to_start(hci: Run, etcd: MemoryEtcd) -> None:
    assert json.loads(hci("status", "--json")[1])["health"] == "unavailable"
    printed = hci("status")[1]
    for start in ("hci dev run node1", "hci dev run gateway2"):
        assert start in printed


ASKING = [
    ("status",),
    ("status", "--json"),
    ("image", "ls"),
    ("image", "info", "vms/there"),
    ("image", "create", "vms/new", "1G"),
    ("image", "resize", "vms/there", "2G"),
    ("image", "rm", "vms/there"),
    ("image", "url", "vms/there"),
    ("image", "export", "vms/there", "/none/there.raw"),
    ("image", "check", "vms/there"),
    ("snapshot", "create", "vms/there@s"),
    ("snapshot", "ls"),
    ("snapshot", "info", "vms/there@s"),
    ("pool", "ls"),
    ("pool", "create", "second"),
    ("pool", "set", "vms", "--when-full", "enospc"),
    ("node", "ls"),
    ("gateway", "ls"),
    ("arbiter", "ls"),
    ("arbiter", "replace", "v", "w"),
    ("heal", "status"),
    ("scrub", "start"),
    ("scrub", "stop"),
    ("scrub", "status"),
    ("cluster", "leftovers"),
    ("cluster", "recover", "--yes"),
]
"""Every command that asks etcd, but for an import, which asks its gateway first."""


@pytest.mark.parametrize("arguments", ASKING, ids=" ".join)
def test_etcd_of_another_cluster_is_refused_and_left_as_it_is(
    hci: Run, config: Path, etcd: MemoryEtcd, arguments: tuple[str, ...]
) -> None:
    # "Cluster … is well", it said of a foreign one, and made and removed images there.
    Catalog(etcd).create_image(ImageName("vms", "there"), 1 << 30)
    own = config_file.load(config).cluster.id
    other = "e" * 32
    config.write_text(config.read_text().replace(own, other))
    before = etcd.get_prefix("/").items
    status, printed, complaint = hci(*arguments)
    assert (status, printed) == (1, "")
    assert complaint == (
        f"hci: etcd holds the cluster {own}, the configuration says {other}; "
        "correct the cluster id or the etcd addresses\n"
    )
    assert etcd.get_prefix("/").items == before


@pytest.mark.usefixtures("empty_etcd")
@pytest.mark.parametrize("arguments", [("image", "ls"), ("pool", "create", "second")])
def test_etcd_without_a_cluster_says_how_one_is_made(hci: Run, arguments: tuple[str, ...]) -> None:
    # It listed nothing, as if there were no images; and advised a command that does not exist.
    status, printed, complaint = hci(*arguments)
    assert (status, printed) == (1, "")
    assert "etcd holds no cluster; correct the etcd addresses" in complaint
    assert "start the nodes: the first one makes the cluster" in complaint


def test_etcd_that_lost_all_is_told_as_that(hci: Run, empty_etcd: MemoryEtcd) -> None:
    lost = LostRecord(by="node1", why="the cluster's record is gone")
    empty_etcd.transaction([], [Put(keys.LOST, lost.encode())])
    assert "etcd lost history" in hci("pool", "create", "second")[2]
    assert "etcd lost history" in hci("status")[1]


def test_status_tells_what_a_node_of_this_machine_ended_with(
    hci: Run, etcd: MemoryEtcd, tmp_path: Path
) -> None:
    # A node whose disk had failed was to be started, and nothing else was said of it.
    folder = tmp_path / "log"
    folder.mkdir(parents=True)
    (folder / "node1.log").write_text("event=node_started\nhci: node node1: Input/output error\n")
    (folder / "node2.log").write_text("event=node_registered\n")
    problems = json.loads(hci("status", "--json")[1])["problems"]
    told = [each["what"] for each in problems]
    assert any(what.endswith("it ended with: node node1: Input/output error") for what in told)
    assert not any("node2" in what and "ended" in what for what in told)


def test_etcd_that_does_not_answer_is_told(hci: Run) -> None:
    status, _, complaint = hci("pool", "ls")
    assert status == 1
    assert complaint.startswith("hci: etcd is not reachable at 127.0.0.1:")
    found = json.loads(hci("status", "--json")[1])
    assert found["health"] == "unavailable"
    assert found["problems"][0]["advice"] == "start it: `hci dev run etcd`"


def test_dev_status_of_a_stopped_cluster_lists_its_members(hci: Run, tmp_path: Path) -> None:
    members = json.loads(hci("dev", "status", "--json")[1])["members"]
    assert [(each["name"], each["kind"], each["state"], each["pid"]) for each in members] == [
        ("etcd", "etcd", "stopped", None),
        *((f"node{number}", "node", "stopped", None) for number in (1, 2, 3)),
        *((f"gateway{number}", "gateway", "stopped", None) for number in (1, 2)),
    ]
    assert members[1]["data_dir"] == str(tmp_path / "node1")
    assert members[1]["log"] == str(tmp_path / "log" / "node1.log")


def test_dev_commands_refuse_a_real_hosts_configuration(hci: Run, tmp_path: Path) -> None:
    path = tmp_path / "host.toml"
    path.write_text(f'[cluster]\nid = "{"0" * 32}"\netcd = ["127.0.0.1:2379"]\n')
    status, _, complaint = hci("dev", "stop", "--config", str(path))
    assert status == 1
    assert "is not of a cluster that `hci dev` started" in complaint


def test_dev_start_in_a_folder_of_something_else_is_refused(hci: Run, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").touch()
    assert "is not empty and holds no cluster" in hci("dev", "start", str(other))[2]
    assert "has 3 nodes, not 4" in hci("dev", "start", str(tmp_path), "--nodes", "4")[2]
    few = tmp_path / "few"
    refused = hci("dev", "start", str(few), "--nodes", "2")[2]
    assert "has 3 nodes or more; two nodes do with --arbiter" in refused
    refused = hci("dev", "start", str(few), "--nodes", "1", "--arbiter")[2]
    assert "has 2 nodes or more" in refused
    assert not few.exists()


@pytest.mark.parametrize(
    ("folder", "pool", "told"),
    [
        ("new", "Bad Pool", "'Bad Pool' is not a pool name: use 1 to 63 lower-case"),
        ("n\x7fw", "vms", "is not valid TOML"),
        ("n\udcffw", "vms", "is not UTF-8, as its configuration has to be"),
    ],
)
def test_dev_start_that_would_write_a_wrong_configuration_makes_no_folder(
    hci: Run, tmp_path: Path, folder: str, pool: str, told: str
) -> None:
    # It wrote the configuration, found it wrong, and found it wrong at each start from then on.
    status, _, complaint = hci("dev", "start", str(tmp_path / folder), "--pool", pool)
    assert status == 1
    assert told in complaint
    assert [path.name for path in tmp_path.iterdir()] == ["hci.toml"]


def test_dev_start_of_a_cluster_with_another_pool_is_refused(hci: Run, tmp_path: Path) -> None:
    # It was passed over, unlike --nodes and --gateways.
    status, _, complaint = hci("dev", "start", str(tmp_path), "--pool", "other")
    assert status == 1
    assert "was made with the pool vms; leave --pool out" in complaint
    assert "`hci pool create other`" in complaint


@pytest.mark.parametrize(
    ("written", "understood"),
    [
        (["image", "ls", "--config", "a"], ["--config", "a", "image", "ls"]),
        (["image", "ls", "--config=a", "--json"], ["--config=a", "image", "ls", "--json"]),
        (["--config", "a", "status"], ["--config", "a", "status"]),
        (["image", "rm", "--", "--config"], ["image", "rm", "--", "--config"]),
        (["image", "ls", "--config"], ["--config"]),
        (["status", "--config", "--json"], ["--config"]),
    ],
)
def test_config_may_stand_anywhere(written: list[str], understood: list[str]) -> None:
    assert cli.config_first(written) == understood


def test_dev_commands_take_the_folder_that_start_took(
    hci: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only `start` took it: to stop that cluster one had to know of HCI_CONFIG.
    monkeypatch.delenv("HCI_CONFIG")
    for arguments in (("status", str(tmp_path)), ("status", "--dir", str(tmp_path))):
        status, printed, _ = hci("dev", *arguments, "--json")
        assert status == 0
        assert json.loads(printed)["dir"] == str(tmp_path)
    status, _, complaint = hci("dev", "kill", "node1", "--dir", str(tmp_path))
    assert (status, complaint) == (1, "hci: node1 is not running; see `hci dev status`\n")
    assert hci("dev", "stop", str(tmp_path))[0] == 0


def test_folder_with_a_name_that_is_not_utf8_is_printed(
    hci: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What had been done ended with a traceback as it was said.
    monkeypatch.delenv("HCI_CONFIG")
    folder = tmp_path / "n\udcffw"
    folder.mkdir()
    (tmp_path / "hci.toml").rename(folder / "hci.toml")
    status, printed, _ = hci("dev", "status", str(folder), "--json")
    assert (status, json.loads(printed)["dir"]) == (0, str(folder))
    assert hci("dev", "stop", str(folder))[0] == 0


@pytest.mark.usefixtures("etcd")
def test_text_that_is_not_utf8_is_one_line_where_nobody_else_says_so(
    hci: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_self: Catalog) -> None:
        "\udcff".encode()

    monkeypatch.setattr(Catalog, "pools", fail)
    status, printed, complaint = hci("pool", "ls")
    assert (status, printed) == (1, "")
    assert complaint.startswith("hci: a name or a value that was given is not UTF-8: ")
    assert complaint.count("\n") == 1


def test_dev_cluster_without_an_arbiter_gets_none_later(hci: Run, tmp_path: Path) -> None:
    folder = tmp_path / "whole"
    folder.mkdir()
    (folder / "hci.toml").write_text(layout.new_config(folder, 3, 1, "vms"))
    status, _, complaint = hci("dev", "start", str(folder), "--arbiter")
    assert status == 1
    assert "has no arbiter; leave --arbiter out" in complaint


def test_arbiters_are_listed_with_their_pools(hci: Run, etcd: MemoryEtcd) -> None:
    assert hci("arbiter", "ls")[1] == "no arbiters are registered\n"
    record = ArbiterRecord(
        name="witness", id="f" * 32, address="127.0.0.1:1", host="far", start_counter=1
    )
    Catalog(etcd).announce_arbiter(record, etcd.grant_lease(60))
    assert hci("pool", "create", "p", "--policy", "thin-arbiter", "--arbiter", "witness")[0] == 0
    (listed,) = json.loads(hci("arbiter", "ls", "--json")[1])
    assert (listed["name"], listed["state"], listed["pools"]) == ("witness", "down", ["p"])
    pools = {pool["name"]: pool["arbiter"] for pool in json.loads(hci("pool", "ls", "--json")[1])}
    assert pools == {"p": "witness", "vms": None}


def test_daemon_that_is_told_to_end_while_it_is_imported_ends(tmp_path: Path) -> None:
    # The command's handler raised SystemExit in a callback of an import, where it was lost: the
    # daemon went on to start, and served on.
    program = (
        "import os, signal, sys; from hci import cli; import hci.cli.app as app;"
        "app.app = lambda *_, **__: (os.kill(os.getpid(), signal.SIGTERM), sys.exit(0));"
        "cli.main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", program, "--config", str(tmp_path / "hci.toml")]
    daemon = subprocess.run([*command, "node", "serve", "--name", "node1"])
    assert daemon.returncode == -signal.SIGTERM
    other = subprocess.run([*command, "image", "import", "node", "vms/serve"])
    assert other.returncode == 128 + signal.SIGTERM, "what is half done is undone"
