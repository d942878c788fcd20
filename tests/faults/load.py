"""Load on an image while something is done to the cluster: fio that verifies what it wrote."""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
import tomllib
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from tests.devcluster import POOL, DevCluster
from tests.e2e.guest.machine import nbd_blockdev

SIZE_MIB = 64
# Slow enough that a moment of its own choice falls into the writes, on any machine.
WRITE_RATE_MIB = 16
READ_RATE_MIB = 64
# Written once, then read back once.
WRITING_S = SIZE_MIB / WRITE_RATE_MIB
DURATION_S = WRITING_S + SIZE_MIB / READ_RATE_MIB
# Moments are drawn up to here after the first write, which leaves as much for what is done then.
STRIKE_S = WRITING_S / 2
END_TIMEOUT_S = 120.0
START_TIMEOUT_S = 60.0


def rounds(default: int) -> int:
    """How often a fault is tried: HCI_FAULT_ROUNDS for long soaks, else `default`."""
    return int(os.environ.get("HCI_FAULT_ROUNDS", default))


def drawn_seed(number: int = 0) -> int:
    """The seed of a test's choices, of its round `number`; printed, so that it can be given again.

    HCI_FAULT_SEED gives that of the first round, from which those of the others follow.
    """
    given = os.environ.get("HCI_FAULT_SEED")
    seed = random.randrange(1 << 32) if given is None else (int(given) + number) % (1 << 32)
    print(f"round {number}: HCI_FAULT_SEED={seed}")
    return seed


EACH = "each"
"""As HCI_FAULT: every fault that there is in turn, one in each round."""


def plays_each() -> bool:
    """Whether there is time for all that there is."""
    return os.environ.get("HCI_FAULT") == EACH


def fault_rounds(faults: Sequence[str]) -> int:
    """How many rounds a test has that plays one of these faults in each."""
    return len(faults) if plays_each() else rounds(1)


def drawn_fault(faults: Sequence[str], chance: random.Random, number: int) -> str:
    """The fault of round `number`: by chance, unless HCI_FAULT is `each` or names one."""
    # Drawn in any case, so that what else a seed decides stays the same.
    drawn = chance.choice(faults)
    wanted = os.environ.get("HCI_FAULT")
    if wanted is None:
        return drawn
    if wanted == EACH:
        return faults[number % len(faults)]
    if wanted not in faults:
        pytest.skip(f"HCI_FAULT={wanted} is none of {', '.join(faults)}")
    return wanted


def seeds(count: int) -> Iterator[int]:
    """The seeds of a test's rounds: each the one before it and 1, so that choices go in turn."""
    first = drawn_seed()
    yield first
    for number in range(1, count):
        seed = (first + number) % (1 << 32)
        print(f"round {number}: HCI_FAULT_SEED={seed}")
        yield seed


def written(cluster: DevCluster, image: str) -> int:
    """The writes to an image that a gateway has answered since it opened it."""
    config = tomllib.loads(cluster.config.read_text())
    found = 0
    for gateway in config["gateway"].values():
        address = f"http://{gateway['metrics']}/metrics"
        with urllib.request.urlopen(address, timeout=START_TIMEOUT_S) as answer:
            for line in answer.read().decode().splitlines():
                name, _, value = line.rpartition(" ")
                if name == f'hci_image_requests_total{{image="{POOL}/{image}",kind="writes"}}':
                    found += int(float(value))
    return found


def await_write(cluster: DevCluster, image: str, fio: VerifyingFio) -> None:
    """Returns when a gateway has answered fio's first write to it."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not written(cluster, image):
        assert fio.is_running, "fio ended before it had written"
        assert time.monotonic() < deadline, "fio writes nothing"
        time.sleep(0.02)


class FioError(Exception):
    """fio saw an I/O error, found wrong content, or did not end."""


class VerifyingFio:
    """fio writing random places with many in flight, syncing, then reading all of it back."""

    def __init__(self, uri: str, seed: int, directory: Path) -> None:
        self._output = directory / "fio.out"
        command = [
            *("fio", "--name=verify", "--direct=1", "--thread", "--output-format=json"),
            *("--rw=randwrite", "--bsrange=4k-64k", f"--size={SIZE_MIB}m", "--iodepth=16"),
            *("--verify=crc32c", "--verify_fatal=1", "--fsync=16", f"--randseed={seed}"),
            f"--rate={READ_RATE_MIB}m,{WRITE_RATE_MIB}m",
            *("--ioengine=nbd", f"--uri={uri}"),
        ]
        with self._output.open("w") as output:
            self._process = subprocess.Popen(
                command,
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    @property
    def is_running(self) -> bool:
        """Whether fio has not ended yet."""
        return self._process.poll() is None

    def finish(self) -> dict[str, Any]:
        """Waits for the end; returns fio's account of its job, raises FioError if not all well."""
        try:
            self._process.wait(timeout=END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise FioError(f"fio did not end within {END_TIMEOUT_S:.0f} s") from None
        text = self._output.read_text(errors="replace")
        if self._process.returncode != 0:
            raise FioError(f"fio: exit {self._process.returncode}\n{text[:2000]}")
        job: dict[str, Any] = json.loads(text[text.index("{") : text.rindex("}") + 1])["jobs"][0]
        if job["error"] or job["read"]["total_ios"] == 0:
            raise FioError(f"fio: error {job['error']}, {job['read']['total_ios']} reads")
        return job


class ReconnectingDisk:
    """An image behind QEMU's reconnecting NBD client, as a guest sees it, offered over NBD again.

    fio's own engine and libnbd end with their connection, so load that is to outlive a gateway goes
    to `uri`, which stays while QEMU's block layer behind it waits and reconnects. (QEMU's FUSE
    export would serve as well, but that of 7.2 mixes up the buffers of concurrent writes.)
    """

    def __init__(self, uri: str, directory: Path) -> None:
        socket = directory / "disk.sock"
        self.uri = f"nbd+unix:///disk?socket={socket}"
        self._socket = socket
        self._log = directory / "storage-daemon.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [
                    *("qemu-storage-daemon", "--blockdev", json.dumps(nbd_blockdev(uri, "disk"))),
                    *("--nbd-server", f"addr.type=unix,addr.path={socket},max-connections=0"),
                    *("--export", "nbd,id=disk,node-name=disk,name=disk,writable=on"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> Self:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._is_offered():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.close()
                raise FioError(f"qemu-storage-daemon: {self._log.read_text()}")
            time.sleep(0.05)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the daemon, by force where a request hangs."""
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _is_offered(self) -> bool:
        asked = subprocess.run(
            ["nbdinfo", "--size", self.uri], capture_output=True, timeout=START_TIMEOUT_S
        )
        return asked.returncode == 0


def gateways_lost_under_fio(
    cluster: DevCluster, folder: Path, strike: Callable[[], None]
) -> Iterator[str]:
    """Has `strike` end gateways, which it starts again, at a chosen moment under fio that verifies.

    Gives the image of each round once all is well again; its replicas are compared after that.
    """
    for number in range(rounds(1)):
        seed = drawn_seed(number)
        moment_s = random.Random(seed).uniform(0, STRIKE_S)
        print(f"round {number}: seed {seed}: {moment_s:.2f} s after the first write")
        image = f"fio-{number}"
        directory = folder / image
        directory.mkdir()
        cluster.create(image, f"{SIZE_MIB}M")
        with ReconnectingDisk(cluster.url(image), directory) as disk:
            with VerifyingFio(disk.uri, seed, directory) as fio:
                await_write(cluster, image, fio)
                time.sleep(moment_s)
                assert fio.is_running
                strike()
                # The new process counts from 0: there was something left to write.
                await_write(cluster, image, fio)
                fio.finish()
        cluster.await_health("ok")
        yield image
        cluster.must_be_equal(image)
        cluster.remove(image)
