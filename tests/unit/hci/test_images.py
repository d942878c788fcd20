"""What the command line does with images beyond one record."""

from collections.abc import Callable
from pathlib import Path

import pytest

from etcd.memory import MemoryEtcd
from hci import images
from tests.unit.samples import GIB, node_record
from vmstore import transfer
from vmstore.catalog import Catalog
from vmstore.errors import UnknownImage
from vmstore.names import ImageName
from vmstore.transfer import Source, TransferFailed

NAME = ImageName("vms", "a")


@pytest.fixture
def catalog(monkeypatch: pytest.MonkeyPatch) -> Catalog:
    etcd = MemoryEtcd()
    found = Catalog(etcd)
    for number in range(1, 4):
        found.announce_node(node_record(number), etcd.grant_lease(60))
    found.create_pool("vms")
    monkeypatch.setattr(images, "_delete_at", lambda _node, _image: None)
    return found


def failing(
    monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], object]
) -> Callable[[Catalog], None]:
    """Return an import that fails, behind what happens meanwhile."""

    def fill(*_given: object) -> None:
        meanwhile()
        raise TransferFailed("the gateway is gone")

    monkeypatch.setattr(transfer, "fill", fill)
    source = Source(Path("some.raw"), "raw", GIB)
    return lambda found: images.import_file(found, NAME, source, "nbd:", lambda _done: None)


def test_import_that_fails_leaves_no_image(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TransferFailed):
        failing(monkeypatch, lambda: None)(catalog)
    with pytest.raises(UnknownImage):
        catalog.find(NAME)


def test_import_that_fails_removes_no_image_but_its_own(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Somebody had removed the half-filled image and made another one under its name.
    def replace() -> None:
        catalog.delete_image(NAME)
        catalog.create_image(NAME, 2 * GIB)

    with pytest.raises(TransferFailed, match="the gateway is gone"):
        failing(monkeypatch, replace)(catalog)
    assert catalog.find(NAME).record.size_bytes == 2 * GIB


def test_import_that_fails_behind_the_removal_of_its_image_says_why_it_failed(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TransferFailed, match="the gateway is gone"):
        failing(monkeypatch, lambda: catalog.delete_image(NAME))(catalog)
