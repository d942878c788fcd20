"""`hci image` on a cluster of real processes: nothing half done remains, whatever happens."""

import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.devcluster import CommandError, DevCluster
from tests.faults.nbd_session import NbdSession
from tests.waiting import stop, until

MIB = 1 << 20


def names(cluster: DevCluster) -> list[str]:
    return [image["name"] for image in cluster.json("image", "ls")]


def importing(
    cluster: DevCluster, file: Path, name: str = "vms/big"
) -> tuple["subprocess.Popen[bytes]", int]:
    """Start an import; return it and its qemu-img, which has the image open and is stopped.

    A qemu-img that has not yet connected would wait for a gateway that is gone.
    """
    process = subprocess.Popen(
        cluster.command("image", "import", str(file), name),
        env=cluster.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    search = ["pgrep", "--parent", str(process.pid), "--full", "qemu-img convert"]
    while not (found := subprocess.run(search, capture_output=True).stdout):
        assert process.poll() is None
    qemu_img = int(found)
    stop(qemu_img)
    while all(image["open_on"] is None for image in cluster.json("image", "ls")):
        os.kill(qemu_img, signal.SIGCONT)
        time.sleep(0.02)
        stop(qemu_img)
    return process, qemu_img


def sparse(path: Path, *, random: int = 0) -> Path:
    """A raw disk of 256 MiB with data at its ends."""
    with open(path, "wb") as file:
        file.write(os.urandom(random or MIB))
        file.truncate(256 * MIB - 512)
        file.seek(255 * MIB)
        file.write(os.urandom(1000))
    return path


def test_image_that_was_imported_comes_out_the_same_and_as_sparse(
    cluster: DevCluster, tmp_path: Path
) -> None:
    original = sparse(tmp_path / "original.img")
    cluster.hci("image", "import", str(original), "vms/a/disk 1")
    info = cluster.json("image", "info", "vms/a/disk 1")
    assert info["size_bytes"] == 256 * MIB - 512
    assert set(info["used_bytes"]) == {"node1", "node2", "node3"}
    assert max(info["used_bytes"].values()) < 16 * MIB
    copy = tmp_path / "copy.qcow2"
    cluster.hci("image", "export", "vms/a/disk 1", str(copy))
    subprocess.run(["qemu-img", "compare", "-f", "raw", original, copy], check=True)
    assert copy.stat().st_blocks * 512 < 16 * MIB
    assert cluster.json("image", "check", "vms/a/disk 1")["equal"] is True


def test_file_with_a_name_of_any_bytes_is_imported_and_exported(
    cluster: DevCluster, tmp_path: Path
) -> None:
    # Both were done, and then failed with a traceback as they said so.
    original, copy = (tmp_path / os.fsdecode(b"%s[b]\xff.img" % name) for name in (b"a", b"b"))
    original.write_bytes(os.urandom(MIB))
    strict = {**cluster.environment(), "PYTHONIOENCODING": "utf-8:strict"}
    for arguments in (("import", str(original), "vms/a"), ("export", "vms/a", str(copy))):
        done = subprocess.run(
            cluster.command("image", *arguments), env=strict, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert "[b]\\udcff.img" in done.stdout
    assert copy.read_bytes() == original.read_bytes()


def test_import_that_is_interrupted_leaves_no_image(cluster: DevCluster, tmp_path: Path) -> None:
    big = sparse(tmp_path / "big.img", random=200 * MIB)
    process, qemu_img = importing(cluster, big)
    os.kill(qemu_img, signal.SIGCONT)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert names(cluster) == []


def test_import_while_the_gateway_is_down_is_refused_at_once(
    cluster: DevCluster, tmp_path: Path
) -> None:
    """Its socket is held open for it: without a look at it first, the import waited for ever."""
    small = sparse(tmp_path / "small.img")
    cluster.hci("dev", "kill", "gateway1")
    with pytest.raises(CommandError, match="gateway1 does not answer"):
        cluster.hci("image", "import", str(small), "vms/a")
    assert names(cluster) == []


def test_import_whose_gateway_dies_leaves_no_image_for_long(
    cluster: DevCluster, tmp_path: Path
) -> None:
    big = sparse(tmp_path / "big.img", random=200 * MIB)
    process, qemu_img = importing(cluster, big)
    cluster.hci("dev", "kill", "gateway1")
    os.kill(qemu_img, signal.SIGCONT)
    assert process.wait(60) == 1
    assert process.stderr is not None
    complaint = process.stderr.read().decode()
    assert complaint.startswith(f"hci: importing {big}: ")
    assert complaint.count("\n") == 1
    assert names(cluster) == []


def test_command_on_an_image_with_too_few_nodes_says_whom_it_waited_for(
    cluster: DevCluster, tmp_path: Path
) -> None:
    # Only QEMU's own complaint was shown, "Server shutting down before option 7 (go)".
    small, copy = sparse(tmp_path / "small.img"), tmp_path / "copy.qcow2"
    cluster.hci("image", "create", "vms/unclean", "64M")
    with NbdSession(cluster.url("unclean"), 1) as session:
        session.call("write", 0, 16, 1)
        for member in ("gateway1", "node2", "node3"):
            cluster.kill(member)
    cluster.run("gateway1")
    commands = (
        ("import", str(small), "vms/new"),
        ("export", "vms/unclean", str(copy)),
        ("check", "vms/unclean"),
    )
    with ThreadPoolExecutor() as pool:
        ended = list(pool.map(lambda command: cluster.try_hci("image", *command), commands))
    for done in ended:
        assert done.returncode == 1
        assert "for node2, node3: too few replicas in sync are there" in done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
    assert names(cluster) == ["vms/unclean"]
    assert not copy.exists()


def test_image_that_a_client_has_open_is_not_removed(cluster: DevCluster) -> None:
    cluster.hci("image", "create", "vms/a", "64M")
    reader = subprocess.Popen(
        ["qemu-io", "-f", "raw", cluster.url("a")],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    try:
        while cluster.json("image", "ls")[0]["open_on"] is None:
            assert reader.poll() is None
        with pytest.raises(CommandError, match="vms/a is in use on gateway gateway1"):
            cluster.hci("image", "rm", "vms/a")
    finally:
        reader.communicate(b"quit\n", timeout=60)
    until(
        "the last client that leaves gives the image back",
        lambda: cluster.json("image", "ls")[0]["open_on"] is None,
    )
    cluster.hci("image", "rm", "vms/a")


def test_image_that_shrinks_and_grows_again_reads_as_zeroes_there(cluster: DevCluster) -> None:
    cluster.hci("image", "create", "vms/a", "64M")
    url = cluster.url("a")
    subprocess.run(["qemu-io", "-f", "raw", "-c", "write -P 7 0 64M", url], check=True)
    cluster.hci("image", "resize", "vms/a", "33M", "--force")
    cluster.hci("image", "resize", "vms/a", "64M")
    reads = ["-c", "read -P 7 0 33M", "-c", "read -P 0 33M 31M"]
    read = subprocess.run(
        ["qemu-io", "-r", "-f", "raw", *reads, url], capture_output=True, text=True
    )
    assert "Pattern verification failed" not in read.stdout
    assert read.stdout.count("read ") == 2, read.stderr
    assert cluster.json("image", "check", "vms/a")["equal"] is True


def test_image_that_is_removed_frees_its_space() -> None:
    with DevCluster() as cluster:
        cluster.shorten_logs()
        cluster.create("a", "192M")
        write = ["qemu-io", "-f", "raw", "-c", "write -P 7 0 192M", cluster.url("a")]
        subprocess.run(write, check=True, stdout=subprocess.DEVNULL)
        image = cluster.info("a")
        assert min(image["used_bytes"].values()) >= 192 * MIB
        folders = [cluster.directory / node / "images" / image["id"] for node in cluster.nodes]
        until("it is in files", lambda: min(map(file_bytes, folders)) > 32 * MIB)
        cluster.remove("a")
        until("its files are gone", lambda: not any(folder.exists() for folder in folders))


def file_bytes(folder: Path) -> int:
    """The physical bytes of all files below a folder."""
    return sum(path.stat().st_blocks * 512 for path in folder.glob("**/*") if path.is_file())


def test_image_that_nobody_has_opened_yet_is_equal(cluster: DevCluster) -> None:
    # No node had heard of it, and the first that was asked said so in place of an outcome.
    cluster.hci("image", "create", "vms/fresh", "1G")
    assert cluster.json("image", "check", "vms/fresh")["equal"] is True
    cluster.hci("image", "rm", "vms/fresh")
