"""What a node knows of the cluster's records, as it tells it over gRPC, in parts."""

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from etcd.interface import KeyValue
from hci import control_pb2 as pb
from hci.history import held_record
from shard.ids import ImageId, image_id
from vmstore.history import HeldRecord, Known, Member

T = TypeVar("T")

ENTRIES_PER_PART = 256
"""Records are a few hundred bytes to some tens of KiB; a message holds 64 MiB."""


def known_parts(known: Known, store_id: str, start_counter: int) -> Iterator[pb.KnownPart]:
    """Yield what a node knows."""
    yield pb.KnownPart(
        name=known.member,
        store_id=store_id,
        start_counter=start_counter,
        recoveries=known.recoveries,
        contested=sorted(known.contested),
    )
    for distrusted in _parts(sorted(known.distrusted)):
        yield pb.KnownPart(distrusted=distrusted)
    for held in _parts(list(known.held.values())):
        yield pb.KnownPart(held=[_held_image(each) for each in held])
    for deleted in _parts(sorted(known.deleted)):
        yield pb.KnownPart(deleted=deleted)
    for items in _parts(list(known.records.values())):
        yield pb.KnownPart(records=_entries(items))
    for items in _parts(list(known.former.values())):
        yield pb.KnownPart(former=_entries(items))


def member_of(parts: Iterable[pb.KnownPart]) -> Member:
    """Return what a node told. Raises BadName where it tells ids that are none."""
    all_parts = list(parts)
    assert all_parts, "the first part says who tells"
    first = all_parts[0]
    held = [_held(each) for part in all_parts for each in part.held]
    known = Known(
        first.name,
        first.recoveries,
        held={each.image: each for each in held},
        deleted=frozenset(image_id(each) for part in all_parts for each in part.deleted),
        records=_items(each for part in all_parts for each in part.records),
        former=_items(each for part in all_parts for each in part.former),
        contested=frozenset(image_id(each) for each in first.contested),
        distrusted=frozenset(image_id(each) for part in all_parts for each in part.distrusted),
    )
    return Member(first.name, first.store_id, first.start_counter, known)


def _parts(items: list[T]) -> Iterator[list[T]]:
    for begin in range(0, len(items), ENTRIES_PER_PART):
        yield items[begin : begin + ENTRIES_PER_PART]


def _held_image(held: HeldRecord) -> pb.HeldImage:
    return pb.HeldImage(
        image_id=held.image,
        epoch=held.epoch,
        holder_id=held.holder,
        generation=held.generation,
        digest=held.digest,
        record=held.record.encode() if held.record is not None else b"",
    )


def _held(told: pb.HeldImage) -> HeldRecord:
    found = {
        "epoch": told.epoch,
        "holder": told.holder_id,
        "generation": told.generation,
        "digest": told.digest,
        "body": told.record,
    }
    return held_record(ImageId(image_id(told.image_id)), found)


def _entries(items: Iterable[KeyValue]) -> list[pb.LedgerEntry]:
    return [pb.LedgerEntry(key=i.key, value=i.value, revision=i.mod_revision) for i in items]


def _items(entries: Iterable[pb.LedgerEntry]) -> Mapping[str, KeyValue]:
    return {each.key: KeyValue(each.key, each.value, each.revision) for each in entries}
