"""What is left of images that are gone, or were never finished, and how it is collected.

    kind       what it is                                     is collected
    deleted    a tombstone that a node has not confirmed yet  by itself, when the node is back
    unknown    data on nodes, of an image that etcd does not  by its id only: a tombstone is written
               know and that was not deleted                  for it, and nodes delete by that
    import     an image whose import has not finished         where nobody has it open: it is
                                                              removed like any other

Nothing is ever deleted because etcd lacks it: what is collected gets a tombstone first. While etcd
is known to have lost history nothing is collected at all.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from hci import images
from hci.config import Config
from hci.survey import NodeView
from hci.survey import nodes as look_at_nodes
from shard.ids import ImageId
from vmstore.catalog import Catalog, ImageEntry
from vmstore.errors import VmstoreError


class CollectRefused(VmstoreError):
    """A leftover that was named is not one, or must not be collected now."""


@dataclass(frozen=True)
class Leftover:
    """One leftover; `collectable` by a person's word, `what` says why it is here."""

    kind: str
    image: ImageId
    name: str
    nodes: Sequence[str]
    physical_bytes: int
    what: str
    collectable: bool


def find(config: Config, records: Catalog) -> list[Leftover]:
    """Return all leftovers of the cluster. Raises RecordsLost where etcd lost history."""
    records.check_history()
    views = look_at_nodes(config)
    entries = {entry.image.record.id: entry for entry in records.images()}
    return [
        *_deleted(records),
        *_unknown(views),
        *_imports(records, entries),
    ]


def collect(
    config: Config, records: Catalog, found: Sequence[Leftover], wanted: Collection[str]
) -> list[Leftover]:
    """Collect leftovers; unknown images only where `wanted` names them by id.

    Raises CollectRefused for a name that is no leftover's, and InUse.
    """
    by_id = {each.image: each for each in found if each.collectable}
    strangers = [image for image in wanted if image not in by_id]
    if strangers:
        raise CollectRefused(f"{strangers[0]} is no leftover that can be collected; see the list")
    collected = []
    for each in by_id.values():
        if wanted and each.image not in wanted:
            continue
        if each.kind == "unknown":
            if each.image in wanted:
                records.bury_unknown(each.image, each.nodes)
                collected.append(each)
            continue
        entry = next((e for e in records.images() if e.image.record.id == each.image), None)
        if entry is None or each.image not in records.unfinished_imports():
            continue  # Finished or removed meanwhile.
        images.remove(config, records, entry.name, only=each.image)
        collected.append(each)
    return collected


def _deleted(records: Catalog) -> list[Leftover]:
    found = []
    for image, tombstone in records.tombstones().items():
        if tombstone.awaits:
            what = f"deleted; its data goes from {', '.join(tombstone.awaits)} when that is back"
            found.append(Leftover("deleted", image, "", tombstone.awaits, 0, what, False))
    return found


def _unknown(views: Sequence[NodeView]) -> list[Leftover]:
    nodes: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    for view in views:
        for image in view.unknown:
            nodes.setdefault(image.image_id, []).append(view.name)
            sizes[image.image_id] = sizes.get(image.image_id, 0) + image.physical_bytes
    what = (
        "etcd does not know it, and it was not deleted; `hci cluster recover` may bring it back, "
        "`--collect ID` deletes it for ever"
    )
    return [
        Leftover("unknown", ImageId(image), "", at, sizes[image], what, True)
        for image, at in sorted(nodes.items())
    ]


def _imports(records: Catalog, entries: dict[ImageId, ImageEntry]) -> list[Leftover]:
    found = []
    for image, unfinished in records.unfinished_imports().items():
        entry = entries.get(image)
        if entry is None:
            continue
        holder = images.holder_of(records, image)
        what = f"its import on {unfinished.by} was interrupted"
        if holder is not None:
            what = f"it is being imported on {unfinished.by}, or in use, on gateway {holder}"
        used = sum(images.used_bytes(entry.image.record, records.nodes()).values())
        placed = sorted({node for nodes in entry.image.record.sets for node in nodes})
        name = str(entry.name)
        found.append(Leftover("import", image, name, placed, used, what, holder is None))
    return found
