"""Images that a gateway serves to be read only."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.devcluster import DevCluster
from tests.protocol.raw_client import Client
from tests.protocol.settings import gateway_with

Run = Callable[..., str]
EPERM = 1


@pytest.fixture(scope="module")
def golden(shared: DevCluster) -> Iterator[str]:
    """URI of an image with content that is read only by the gateway's configuration."""
    for name in ("golden/one", "other"):
        shared.create(name, "4M")
    with Client(shared.url("golden/one")).open() as client:
        client.write(0, b"gold")
    with gateway_with(shared, read_only=["vms/golden/*"]):
        yield shared.url("golden/one")


def test_read_only_image_says_so_and_refuses_every_change(golden: str, run: Run) -> None:
    assert "is_read_only: true" in run("nbdinfo", golden)
    run("nbdinfo", "--is", "read-only", golden)
    with Client(golden).open() as client:
        assert client.read(0, 4) == b"gold"
        # The commands that change: WRITE, TRIM, WRITE_ZEROES.
        for number, length in ((1, 4), (4, 4096), (6, 4096)):
            client.request(number, 7, 0, length, b"lead" if number == 1 else b"")
            assert client.reply() == (EPERM, 7)
        assert client.read(0, 4) == b"gold"


def test_read_only_image_is_copied_and_opened_by_qemu_to_read(
    golden: str, run: Run, tmp_path: Path
) -> None:
    run("nbdcopy", golden, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes()[:4] == b"gold"
    run("qemu-io", "-r", "-f", "raw", "-c", "read -P 0x67 0 1", golden)
    run("qemu-io", "-f", "raw", "-c", "write 0 512", golden, fails=True)


def test_images_of_other_names_are_written_as_ever(golden: str, shared: DevCluster) -> None:
    with Client(shared.url("other")).open() as client:
        client.write(0, b"lead")
        assert client.read(0, 4) == b"lead"
