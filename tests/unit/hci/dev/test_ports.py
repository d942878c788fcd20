"""Ports of dev clusters: each cluster has its own, whether it runs or not."""

import json
import socket
import threading
from pathlib import Path

from hci.config import Endpoint
from hci.dev import ports


def config(folder: Path, *numbers: int) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "hci.toml"
    path.write_text("\n".join(f'listen = "127.0.0.1:{number}"' for number in numbers))
    return path


def taken(run_dir: Path, path: Path) -> frozenset[int]:
    with ports.listed(run_dir, path) as found:
        return found


def test_ports_of_another_cluster_are_taken_though_nobody_listens(tmp_path: Path) -> None:
    first = config(tmp_path / "first", 20001, 20002)
    second = config(tmp_path / "second", 20003)
    assert taken(tmp_path, first) == set()
    assert taken(tmp_path, second) == {20001, 20002}
    assert taken(tmp_path, first) == {20003}, "its own are not taken from it"


def test_ports_of_a_cluster_whose_folder_is_gone_are_free_again(tmp_path: Path) -> None:
    gone = config(tmp_path / "gone", 20001)
    taken(tmp_path, gone)
    gone.unlink()
    assert taken(tmp_path, config(tmp_path / "next", 20002)) == set()
    assert json.loads((tmp_path / "clusters.json").read_text()) == [f"{tmp_path}/next/hci.toml"]


def test_configuration_that_was_not_written_is_not_listed(tmp_path: Path) -> None:
    taken(tmp_path, tmp_path / "refused" / "hci.toml")
    assert json.loads((tmp_path / "clusters.json").read_text()) == []


def test_list_that_is_damaged_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "clusters.json").write_text("[half")
    path = config(tmp_path / "a", 20001)
    assert taken(tmp_path, path) == set()
    assert taken(tmp_path, config(tmp_path / "b", 20002)) == {20001}


def test_clusters_made_at_the_same_time_share_no_port(tmp_path: Path) -> None:
    chosen: list[int] = []
    begin = threading.Barrier(8)

    def make(number: int) -> None:
        path = tmp_path / str(number) / "hci.toml"
        begin.wait()
        with ports.listed(tmp_path, path) as others:
            # All but a few ports are taken, so that without the list two would choose the same.
            mine = ports.choose(10, others | set(range(20000 + 100, 32000)))
            config(path.parent, *mine)
        chosen.extend(mine)

    threads = [threading.Thread(target=make, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(chosen) == len(set(chosen)) == 80


def test_port_that_somebody_listens_on_is_not_chosen(tmp_path: Path) -> None:
    free = ports.choose(2, ())
    with socket.create_server(("127.0.0.1", free[0])):
        assert not ports.is_free(Endpoint("127.0.0.1", free[0]))
        rest = set(range(20000, 32000)) - set(free)
        assert ports.choose(1, rest) == [free[1]]
