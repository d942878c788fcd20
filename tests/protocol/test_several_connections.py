"""Several connections to one image: what CAN_MULTI_CONN promises.

Covers what one connection sees of another's answered writes, a flush on a connection that wrote
nothing, and stock tools that use several connections because they may.
"""

import random
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.devcluster import DevCluster
from tests.protocol.raw_client import FLUSH, Client
from tests.protocol.settings import GATEWAY, metric
from tests.protocol.test_transfer import Disk
from tests.waiting import until

MIB = 1 << 20
Run = Callable[..., str]


def syncs(cluster: DevCluster) -> dict[str, float]:
    """Times that each node has synced its log."""
    return {node: metric(cluster, node, "hci_node_syncs_total") for node in cluster.nodes}


def test_flush_of_one_connection_reaches_every_node_for_the_writes_of_the_others(
    shared: DevCluster,
) -> None:
    shared.create("several", "8M")
    uri = shared.url("several")
    with Client(uri).open() as one, Client(uri).open() as two, Client(uri).open() as idle:
        for step in range(5):
            # The connection that flushes has never written; the others never flush. A flush of the
            # gateway's own after the writes is as good, so that the counting begins before them.
            before = syncs(shared)
            one.write(step * 4096, b"1" * 4096)
            two.write(MIB + step * 4096, b"2" * 4096)
            idle.request(FLUSH, 3)
            assert idle.reply() == (0, 3)
            after = syncs(shared)
            assert all(after[node] > before[node] for node in shared.nodes), (before, after)
        assert two.read(0, 5 * 4096) == b"1" * (5 * 4096)
        assert idle.read(MIB, 5 * 4096) == b"2" * (5 * 4096)


def test_flush_holds_for_connections_that_have_ended(shared: DevCluster) -> None:
    shared.create("ended", "8M")
    uri = shared.url("ended")
    with Client(uri).open() as stays:
        # As above: a flush of the gateway's own after the write is as good.
        before = syncs(shared)
        with Client(uri).open() as leaves:
            leaves.write(0, b"3" * 4096)
        stays.request(FLUSH, 3)
        assert stays.reply() == (0, 3)
        after = syncs(shared)
        assert all(after[node] > before[node] for node in shared.nodes), (before, after)
        assert stays.read(0, 4096) == b"3" * 4096


def test_nbdcopy_over_several_connections_is_equal_both_ways(
    shared: DevCluster, run: Run, tmp_path: Path
) -> None:
    source, back = tmp_path / "source", tmp_path / "back"
    chance = random.Random(12)
    parts = [chance.randbytes(4 * MIB) if number % 3 else bytes(4 * MIB) for number in range(16)]
    source.write_bytes(b"".join(parts))
    shared.create("copied", f"{len(parts) * 4}M")
    uri = shared.url("copied")
    many = ("--connections=4", "--threads=2", "--requests=16")
    run("nbdcopy", *many, "--flush", source, uri)
    run("nbdcopy", *many, uri, back)
    assert back.read_bytes() == source.read_bytes()


def test_nbdcopy_uses_as_many_connections_as_it_is_told_to(
    shared: DevCluster, tmp_path: Path
) -> None:
    # It uses one where the server does not say that it may use several, and copies all the same.
    shared.create("counted", "64M")
    clients = partial(metric, shared, GATEWAY, "hci_gateway_clients")
    until("nobody is there", lambda: clients() == 0)
    # So slow that the copy is not over before somebody looks.
    source = Disk(tmp_path, 64 * MIB, slow=["delay-extents=600"])
    try:
        command = ["nbdcopy", "--connections=4", "--threads=4", source.uri, shared.url("counted")]
        with subprocess.Popen(command) as copying:
            try:
                until("all are there", lambda: clients() >= 4)
                assert copying.poll() is None
                assert clients() == 4
            finally:
                copying.terminate()
    finally:
        source.close()


def test_nbdcopy_from_one_image_to_another_is_equal(
    shared: DevCluster, run: Run, tmp_path: Path
) -> None:
    content = random.Random(13).randbytes(8 * MIB) + bytes(8 * MIB)
    source = tmp_path / "source"
    source.write_bytes(content)
    for name in ("from", "to"):
        shared.create(name, "16M")
    run("nbdcopy", source, shared.url("from"))
    run("nbdcopy", "--connections=4", "--flush", shared.url("from"), shared.url("to"))
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", shared.url("from"), shared.url("to"))
    shared.must_be_equal("to")


def test_qemu_img_convert_with_coroutines_is_equal(
    shared: DevCluster, run: Run, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.write_bytes(random.Random(14).randbytes(24 * MIB) + bytes(8 * MIB))
    shared.create("converted", "32M")
    uri = shared.url("converted")
    run("qemu-img", "convert", "-n", "-W", "-m", "16", "-f", "raw", "-O", "raw", source, uri)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", source, uri)
