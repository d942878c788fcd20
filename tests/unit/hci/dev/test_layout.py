"""What a new dev cluster's configuration says."""

import socket
from pathlib import Path

import pytest

from hci import config_file
from hci.config import Config, Endpoint
from hci.config_values import LONGEST_SOCKET_PATH
from hci.dev import layout, ports


def parsed(folder: Path, nodes: int = 3, gateways: int = 2) -> Config:
    text = layout.new_config(folder, nodes, gateways, "vms")
    return config_file.parse(text, folder / layout.CONFIG_NAME)


def test_new_config_has_all_members_each_on_a_host_of_its_own() -> None:
    found = parsed(Path("/srv/cluster"))
    assert list(found.nodes) == ["node1", "node2", "node3"]
    assert [node.host for node in found.nodes.values()] == ["host1", "host2", "host3"]
    assert [gateway.host for gateway in found.gateways.values()] == ["host1", "host2"]
    assert found.nodes["node2"].data_dir == Path("/srv/cluster/node2")


def test_new_config_with_an_arbiter_has_it_on_a_host_of_its_own() -> None:
    text = layout.new_config(Path("/srv/c"), 2, 1, "vms", arbiter=True)
    found = config_file.parse(text, Path("/srv/c/hci.toml"))
    assert list(found.arbiters) == ["arbiter"]
    arbiter = found.arbiter("arbiter")
    assert (arbiter.host, arbiter.data_dir) == ("host3", Path("/srv/c/arbiter"))
    assert parsed(Path("/srv/c")).arbiters == {}


def test_new_config_gives_every_listener_a_port_of_its_own() -> None:
    found = parsed(Path("/srv/cluster"))
    assert found.dev is not None
    ports = [found.cluster.etcd[0].port, found.dev.etcd_peer.port]
    for node in found.nodes.values():
        ports += [node.listen.port, node.control.port]
    for gateway in found.gateways.values():
        assert gateway.nbd_listen is not None
        ports += [gateway.control.port, gateway.nbd_listen.port]
    assert len(set(ports)) == len(ports)
    assert max(ports) < 32768, "above begins what Linux gives to outgoing connections"


def test_new_config_in_a_deep_folder_has_short_sockets() -> None:
    deep = Path("/srv") / ("deep/" * 60) / 'with "quotes" \\ and ü'
    found = parsed(deep)
    assert found.nodes["node1"].data_dir == deep / "node1"
    socket_path = found.gateways["gateway2"].nbd_socket
    assert len(str(socket_path)) <= LONGEST_SOCKET_PATH


def test_two_new_configs_share_no_run_folder() -> None:
    first, second = parsed(Path("/srv/a")), parsed(Path("/srv/a"))
    assert first.dev is not None
    assert second.dev is not None
    assert first.dev.run_dir != second.dev.run_dir
    assert first.cluster.id != second.cluster.id


def test_port_in_use_is_not_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert not ports.is_free(Endpoint("127.0.0.1", port))
    assert ports.is_free(Endpoint("127.0.0.1", port))


def test_write_replaces_a_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "hci.toml"
    for text in ("a long first text", "short"):
        layout.write(path, text)
        assert path.read_text() == text
    assert [each.name for each in tmp_path.iterdir()] == ["hci.toml"]


def test_run_folder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    link = tmp_path / "run"
    link.symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(layout.DevError, match="belongs to somebody else"):
        layout.make_run_dir(link)
