"""The configuration file: what is taken, and how each mistake is told."""

import re
from pathlib import Path

import pytest

from hci import config_file, images
from hci.config import DEFAULT_LOG_BYTES, DEFAULT_POLL_US, AccessRule, ClientLimits, Endpoint
from hci.errors import ConfigError
from vmstore.names import parse_image_name
from vmstore.slowness import SlowLimits

PATH = Path("/etc/hci/hci.toml")

WHOLE = """
[cluster]
id = "00112233445566778899aabbccddeeff"
etcd = ["127.0.0.1:2379", "[::1]:2379"]

[node.node1]
data_dir = "/srv/node1"
listen = "127.0.0.1:7101"
control = "127.0.0.1:7201"
socket = "/run/hci/node1.sock"
host = "host1"
zone = "cellar"
log_bytes = "64M"
poll_us = 0

[gateway.gateway1]
host = "host1"
control = "127.0.0.1:7301"
nbd_socket = "/run/hci/nbd.sock"
nbd_listen = "127.0.0.1:10809"
run_dir = "/run/hci"
clients_max = 100
client_bytes_in_flight = "32M"
bytes_in_flight = "1G"
handshake_timeout = "1m"
idle_timeout = "12h"
poll_us = 200
read_only = ["vms/golden-*", "iso/*"]

[arbiter.witness]
data_dir = "/srv/witness"
listen = "127.0.0.1:7401"
host = "far"
metrics = "127.0.0.1:9703"

[slow]
report_ms = 300
leave_behind_ms = 4000
for_s = 20
back_after_s = 90
"""

SMALL = """
[cluster]
id = "00112233445566778899aabbccddeeff"
etcd = ["127.0.0.1:2379"]
[node.node1]
data_dir = "/srv/node1"
listen = "127.0.0.1:7101"
control = "127.0.0.1:7201"
"""


def test_config_with_every_key_is_read() -> None:
    found = config_file.parse(WHOLE, PATH)
    assert found.cluster.etcd == (Endpoint("127.0.0.1", 2379), Endpoint("::1", 2379))
    arbiter = found.arbiter("witness")
    assert (arbiter.data_dir, arbiter.host) == (Path("/srv/witness"), "far")
    assert arbiter.listen == Endpoint("127.0.0.1", 7401)
    node = found.node("node1")
    assert (node.data_dir, node.zone, node.log_bytes) == (Path("/srv/node1"), "cellar", 64 << 20)
    assert (node.poll_us, found.gateway("gateway1").poll_us) == (0, 200)
    assert str(node.listen) == "127.0.0.1:7101"
    assert found.gateway("gateway1").nbd_listen == Endpoint("127.0.0.1", 10809)
    assert found.slow == SlowLimits(300, 4000, 20.0, 90.0)
    assert found.dev is None


def test_config_with_only_what_is_needed_has_defaults() -> None:
    found = config_file.parse(SMALL, PATH)
    node = found.node("node1")
    assert (node.socket, node.zone, node.log_bytes) == (None, "default", DEFAULT_LOG_BYTES)
    assert node.poll_us == DEFAULT_POLL_US
    assert node.host
    assert found.gateways == {}
    assert found.slow == SlowLimits()


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ('zone = "cellar"', 'zoen = "cellar"', "unknown key node.node1.zoen (known: control, "),
        ("[cluster]", "[clutser]", "cluster is missing"),
        (
            "[gateway.gateway1]",
            "[gatewya.gateway1]",
            "unknown key gatewya (known: arbiter, cluster, dev, ",
        ),
        ('"00112233445566778899aabbccddeeff"', '"0011"', "cluster.id = '0011': must be 32 "),
        ('"127.0.0.1:7101"', '"127.0.0.1"', "node.node1.listen = '127.0.0.1': must look like "),
        ('"127.0.0.1:7101"', '"127.0.0.1:0"', "must end with a port from 1 to 65535"),
        ('"127.0.0.1:7101"', '"::1:7101"', "must look like 127.0.0.1:7101 or [::1]:7101"),
        ('"127.0.0.1:7101"', "7101", "node.node1.listen = 7101: must be a string"),
        ('listen = "127.0.0.1:7101"', "", "node.node1.listen is missing"),
        ('"/srv/node1"', '"srv/node1"', "node.node1.data_dir = 'srv/node1': must be an absolute"),
        ('"64M"', '"64 apples"', "node.node1.log_bytes = '64 apples': '64 apples' is not a size"),
        ('"64M"', '"4M"', "must be at least 16M"),
        ('"64M"', "true", "node.node1.log_bytes = True: must be a string"),
        ("poll_us = 0", "poll_us = 1001", "node.node1.poll_us = 1001: must be a number of micros"),
        ("poll_us = 0", 'poll_us = "1s"', "node.node1.poll_us = '1s': must be a number of micros"),
        ("[node.node1]", "[node.Node_1]", "node.Node_1: 'Node_1' is not a node name"),
        ("[node.node1]", "[[node.node1]]", "must be a table"),
        ('["127.0.0.1:2379", "[::1]:2379"]', "[]", "cluster.etcd = []: must be a list such as"),
        ("report_ms = 300", "report_ms = 5", "slow.report_ms = 5: must be a number of "),
        ("leave_behind_ms = 4000", "leave_behind_ms = -1", "slow.leave_behind_ms = -1: must be "),
        ("leave_behind_ms = 4000", "leave_behind_ms = 200", "must be 0, or at least report_ms"),
        ("for_s = 20", "for_s = 0.5", "slow.for_s = 0.5: must be a number of seconds"),
        ("[cluster]", "[cluster", "is not valid TOML"),
        ("report_ms = 300", f"report_ms = {'9' * 5000}", "is not valid TOML"),
        ("report_ms = 300", f"report_ms = {'9' * 400}", "must be a number of "),
        ("for_s = 20", f"for_s = {'9' * 400}", "must be a number of seconds"),
        ("report_ms = 300", f"report_ms = {'[' * 9999}", "is not valid TOML"),
        ('"/run/hci/nbd.sock"', f'"/run/{"x" * 120}"', "a socket's path has at most 107 bytes"),
    ],
)
def test_config_with_a_mistake_is_refused_by_name(before: str, after: str, told: str) -> None:
    assert before in WHOLE
    with pytest.raises(ConfigError) as caught:
        config_file.parse(WHOLE.replace(before, after), PATH)
    assert str(caught.value).startswith(f"{PATH}: ")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_config_without_the_member_asked_for_names_those_it_has() -> None:
    with pytest.raises(ConfigError, match=r"no \[node.node9\] in it \(known: node1\)"):
        config_file.parse(WHOLE, PATH).node("node9")


def test_config_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none.toml: cannot be read: No such file"):
        config_file.load(tmp_path / "none.toml")


def test_lookup_takes_option_then_variable_then_system_then_dev(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system, dev = tmp_path / "system.toml", tmp_path / "data" / "hci-dev" / "hci.toml"
    monkeypatch.setattr(config_file, "SYSTEM_CONFIG", system)
    environ = {"XDG_DATA_HOME": str(tmp_path / "data")}
    with pytest.raises(ConfigError, match="`hci dev start`"):
        config_file.find(None, environ)
    dev.parent.mkdir(parents=True)
    dev.touch()
    assert config_file.find(None, environ) == dev
    system.touch()
    assert config_file.find(None, environ) == system
    assert config_file.find(None, environ | {"HCI_CONFIG": "/a.toml"}) == Path("/a.toml")
    assert config_file.find(Path("/b.toml"), environ | {"HCI_CONFIG": "/a.toml"}) == Path("/b.toml")


def test_default_folder_of_a_user_without_a_home_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(ConfigError, match="no home folder: set HOME"):
        config_file.default_dev_dir({})


def test_config_of_a_gateway_has_limits_and_patterns() -> None:
    gateway = config_file.parse(WHOLE, PATH).gateway("gateway1")
    assert gateway.limits == ClientLimits(100, 32 << 20, 1 << 30, 60, 43_200)
    assert gateway.is_read_only("vms/golden-debian")
    assert gateway.is_read_only("iso/a")
    assert not gateway.is_read_only("vms/web")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("clients_max = 0", "from 1 to 60000"),
        ('bytes_in_flight = "1K"', "at least 1M"),
        ('handshake_timeout = "2d"', "from 1s to 1h"),
        ("handshake_timeout = 0", "from 1s to 1h"),
        ("idle_timeout = 5", "must be a string"),
        ('idle_timeout = "5 s"', "must look like"),
        ('read_only = "vms/*"', "must be a list"),
    ],
)
def test_config_with_a_wrong_limit_is_refused_by_its_name(line: str, told: str) -> None:
    key = line.split(" ", maxsplit=1)[0]
    text = re.sub(rf"^{key} = .*$", line, WHOLE, flags=re.MULTILINE)
    with pytest.raises(ConfigError, match=f"gateway.gateway1.{key}") as caught:
        config_file.parse(text, PATH)
    assert told in str(caught.value)


TLS = """
[gateway.gateway1.tls]
certificate = "/etc/hci/server-cert.pem"
key = "/etc/hci/server-key.pem"
client_ca = "/etc/hci/ca-cert.pem"

[[gateway.gateway1.tls.access]]
clients = ["CN=host*"]
images = ["vms/*"]

[[gateway.gateway1.tls.access]]
clients = ["DNS:backup.example.org"]
images = ["*"]
read_only = true
"""


def test_config_of_tls_is_read_with_its_rules() -> None:
    found = config_file.parse(WHOLE + TLS, PATH).gateway("gateway1").tls
    assert found is not None
    assert (found.tcp, found.socket) == ("required", "off")
    assert found.client_ca == Path("/etc/hci/ca-cert.pem")
    gateway = config_file.parse(WHOLE + TLS, PATH).gateway("gateway1")
    url = images.url(gateway, parse_image_name("vms/a"), tcp=True)
    assert url == "nbds://127.0.0.1:10809/vms/a"
    assert found.access == (
        AccessRule(("CN=host*",), ("vms/*",), read_only=False),
        AccessRule(("DNS:backup.example.org",), ("*",), read_only=True),
    )


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('client_ca = "', 'tcp = "maybe"\nclient_ca = "', "gateway.gateway1.tls.tcp"),
        ("read_only = true", "read_only = 1", "gateway.gateway1.tls.access.1.read_only"),
        ('images = ["*"]', "", "gateway.gateway1.tls.access.1.images is missing"),
        ('images = ["vms/*"]', 'image = ["vms/*"]', "gateway.gateway1.tls.access.0.images"),
    ],
)
def test_config_of_tls_with_a_slip_is_refused_by_its_name(old: str, new: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_file.parse(WHOLE + TLS.replace(old, new), PATH)
    assert told in str(caught.value)
