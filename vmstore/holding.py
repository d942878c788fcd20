"""The transactions of a lease holder: taking an image's lease, changing its record, giving it back.

Each compares the image's record as it was read and the lease key, so that a holder that was
replaced changes nothing. Taking the lease, raising the epoch and marking the image unclean are one
transaction; the caller has every in-sync node store the epoch before its first I/O.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

from etcd import keys
from etcd.images import Grant, ImageRecord
from etcd.interface import (
    Compare,
    Delete,
    Etcd,
    KeyAbsent,
    LeaseEquals,
    Operation,
    Put,
    RangeEmpty,
    ValueEquals,
)
from etcd.records import ClusterRecord, LeaseRecord, LostRecord, NameRecord
from shard.geometry import check_image_size
from shard.ids import ImageId
from shard.membership import Membership, check_successor
from vmstore.clone_errors import HasClones
from vmstore.errors import (
    HistoryLost,
    InUse,
    LeaseLost,
    LeaseMoved,
    RecordChanged,
    RecordsLost,
    ShrinkRefused,
    UnknownImage,
)
from vmstore.names import ImageName
from vmstore.stored import Stored, commit, put_found, read

INTACT = KeyAbsent(keys.LOST)
"""Holds while nobody has found that etcd lost history. What begins something compares it; a holder
goes on without, since its image's record and lease tell enough."""


@dataclass(frozen=True, slots=True)
class Held:
    """An image whose lease the caller has: the record as last stored, and what the lease is."""

    image: Stored[ImageRecord]
    lease: LeaseRecord
    etcd_lease: int

    @property
    def record(self) -> ImageRecord:
        """The image's record."""
        return self.image.record


class Holding:
    """What a gateway does to the record of an image that it opens, serves and closes.

    All methods raise EtcdUnavailable (nothing changed: try again), OutcomeUnknown (call again
    with the same arguments), LeaseNotFound (the etcd lease is gone), and for a holder LeaseLost,
    RecordChanged (read again) and HistoryLost (stop).
    """

    def __init__(self, etcd: Etcd) -> None:
        self._etcd = etcd

    @property
    def etcd(self) -> Etcd:
        """Where the records are."""
        return self._etcd

    def lost(self) -> Stored[LostRecord] | None:
        """Return what says that etcd lost history, or None where nobody found that."""
        return read(self._etcd, LostRecord, keys.LOST)

    def mark_lost(self, by: str, why: str, cluster: Stored[ClusterRecord] | None) -> None:
        """Say in etcd that it lost history, unless that is said already.

        `cluster` is the cluster's record as it was when `by` found that: what a recovery has mended
        since is not accused again.
        """
        put = Put(keys.LOST, LostRecord(by=by, why=why).encode())
        as_found: tuple[Compare, ...] = (KeyAbsent(keys.CLUSTER),)
        if cluster is not None:
            as_found = (ValueEquals(keys.CLUSTER, cluster.value),)
        self._etcd.transaction([KeyAbsent(keys.LOST), *as_found], [put])

    def check_history(self) -> None:
        """Raise RecordsLost where etcd is known to have lost history."""
        found = self.lost()
        if found is not None:
            raise RecordsLost(found.record.by, found.record.why)

    def lease_of(self, image: ImageId) -> Stored[LeaseRecord] | None:
        """Return who has an image's lease, or None where nobody has."""
        return read(self._etcd, LeaseRecord, keys.lease(image))

    def image(self, image: ImageId) -> Stored[ImageRecord]:
        """Return an image's record. Raises UnknownImage."""
        found = read(self._etcd, ImageRecord, keys.image(image))
        if found is None:
            raise UnknownImage(image)
        return found

    def take_lease(
        self,
        image: Stored[ImageRecord],
        *,
        gateway: str,
        holder: str,
        etcd_lease: int,
        lock: str | None = None,
        instead_of: Stored[LeaseRecord] | None = None,
        maintenance: bool = False,
    ) -> Held:
        """Take an image's lease for the process `holder`: the epoch rises and `clean` goes.

        `lock` names the lock file that the process holds. `instead_of` is a lease that the caller
        may replace: that of a former process of the same gateway, which is surely dead, or one for
        maintenance, whose holder the epoch fences. With `maintenance` the lease is such a one
        itself, and the record keeps who had the image for clients before. Raises InUse where
        another has the lease, RecordsLost, and RecordChanged where the record is no longer `image`.
        `clean` of the record that was read says whether the last holder ended well; that of the
        result is always false.
        """
        before = image.record
        used = before.last_use if maintenance else None
        record = replace(before, epoch=before.epoch + 1, holder=holder, clean=False, used=used)
        lease = LeaseRecord(
            gateway=gateway,
            holder=holder,
            epoch=record.epoch,
            lock=lock,
            maintenance=maintenance,
        )
        lease_key = keys.lease(before.id)
        free: tuple[Compare, ...] = (KeyAbsent(lease_key),)
        if instead_of is not None:
            free = instead_of.unchanged
        image_put = Put(image.key, record.encode())
        lease_put = Put(lease_key, lease.encode(), etcd_lease)
        revision = commit(
            self._etcd,
            [*image.unchanged, *free, INTACT],
            [image_put, lease_put],
            self._lease_found(lease_put),
        )
        if revision is None:
            self.check_history()
            current = self.lease_of(before.id)
            if current is not None and (instead_of is None or current.value != instead_of.value):
                raise InUse(f"image {before.id}", current.record.gateway)
            raise RecordChanged(f"image {before.id}")
        return Held(Stored(image.key, record, image_put.value, revision), lease, etcd_lease)

    def claim(self, held: Held) -> Held:
        """Make a lease for maintenance one that nobody takes over: a client wants the image.

        From now on the record says that the holder has the image for clients.
        """
        lease = replace(held.lease, maintenance=False)
        if lease == held.lease:
            return held
        put = Put(keys.lease(held.record.id), lease.encode(), held.etcd_lease)
        record = replace(held.record, used=None)
        image_put = Put(held.image.key, record.encode())
        revision = commit(self._etcd, self._holds(held), [put, image_put], self._lease_found(put))
        if revision is None:
            self._explain(held)
        stored = Stored(image_put.key, record, image_put.value, revision)
        return replace(held, image=stored, lease=lease)

    def retake_lease(self, held: Held, etcd_lease: int) -> Held:
        """Take a lease that merely lapsed again, under a new etcd lease and the same epoch.

        Raises LeaseLost where another holder came meanwhile.
        """
        lease_key = keys.lease(held.record.id)
        put = Put(lease_key, held.lease.encode(), etcd_lease)
        revision = commit(
            self._etcd, [*held.image.unchanged, KeyAbsent(lease_key)], [put], self._lease_found(put)
        )
        if revision is None and self._lease_found(put)() is not None:
            return replace(held, etcd_lease=etcd_lease)  # in a call whose answer was lost
        if revision is None:
            current = self.lease_of(held.record.id)
            if current is not None and current.value == put.value:
                raise RecordChanged(f"the lease of image {held.record.id}")
            self._explain(held, lease_may_be_gone=True)
        return replace(held, etcd_lease=etcd_lease)

    def change_membership(
        self,
        held: Held,
        membership: Membership,
        *,
        grant: Grant | None = None,
        as_long_as: Sequence[Compare] = (),
    ) -> Held:
        """Store a proposed membership, one generation above the held record's: see `change`."""
        after = replace(held.record, generation=membership.generation, stale=dict(membership.stale))
        return self.change(held, after, grant=grant, as_long_as=as_long_as)

    def change(
        self,
        held: Held,
        after: ImageRecord,
        *,
        grant: Grant | None = None,
        as_long_as: Sequence[Compare] = (),
    ) -> Held:
        """Store who is in sync and which layers there are by `after`, one generation higher.

        `grant` is the arbiter's, where it was asked, and `as_long_as` what must not have changed
        since: then RecordChanged too. For a snapshot the caller has all answered writes on stable
        storage, and none in flight; for a rollback no client at all. Raises HasClones where
        a snapshot would go that clones begin on.
        """
        before = held.record
        check_successor(before.membership, after.membership)
        _check_layers(before, after)
        record = replace(
            before,
            generation=after.generation,
            size_bytes=after.size_bytes,
            stale=after.membership.stale,
            layers=after.layers,
            next_layer=after.next_layer,
            snapshots=after.snapshots,
            merging=after.merging,
            grant=grant or before.grant,
        )
        unused = _unused(before, record)
        try:
            return self._change(held, record, (*as_long_as, *unused))
        except RecordChanged:
            for each in unused:
                self._check_unused(each, before.id)
            raise

    def _check_unused(self, compare: RangeEmpty, image: ImageId) -> None:
        """Raise HasClones where there are clones that a change was not to be made with."""
        found = [
            keys.split_clone(item.key)[2]
            for item in self._etcd.get_prefix(keys.clones(image)).items
            if compare.key <= item.key < compare.end
        ]
        if found:
            names = self.names()
            clones = sorted(str(names.get(clone, clone)) for clone in found)
            raise HasClones(f"a snapshot of {names.get(image, image)}", clones)

    def names(self) -> dict[ImageId, ImageName]:
        """Return what images are called."""
        return {
            NameRecord.decode(item.key, item.value).image: ImageName(*keys.split_name(item.key))
            for item in self._etcd.get_prefix(keys.NAMES).items
        }

    def resize(self, held: Held, size_bytes: int, *, force: bool = False) -> Held:
        """Store a new size. Before a shrink the caller discards what is cut off.

        Raises BadSize, and ShrinkRefused for a smaller size without `force`.
        """
        check_image_size(size_bytes)
        if size_bytes < held.record.size_bytes and not force:
            raise ShrinkRefused(str(held.record.id), held.record.size_bytes, size_bytes)
        if size_bytes == held.record.size_bytes:
            return held
        return self._change(held, replace(held.record, size_bytes=size_bytes))

    def release(self, held: Held, *, clean: bool) -> None:
        """Give a lease back. `clean` says that all is flushed and no request is in flight."""
        record = replace(held.record, clean=clean)
        put = Put(held.image.key, record.encode())
        lease_key = keys.lease(held.record.id)

        def found() -> int | None:
            image = self._etcd.get(put.key)
            if image is None or image.value != put.value or self._etcd.get(lease_key) is not None:
                return None
            return image.mod_revision

        operations: list[Operation] = [Delete(lease_key)]
        if record != held.record:
            operations.append(put)
        if commit(self._etcd, self._holds(held), operations, found) is None:
            self._explain(held)

    def _change(self, held: Held, record: ImageRecord, as_long_as: Sequence[Compare] = ()) -> Held:
        put = Put(held.image.key, record.encode())
        compares = [*self._holds(held), *as_long_as]
        revision = commit(self._etcd, compares, [put], put_found(self._etcd, put))
        if revision is None:
            self._explain(held)
        return replace(held, image=Stored(put.key, record, put.value, revision))

    def _holds(self, held: Held) -> list[Compare]:
        lease_key = keys.lease(held.record.id)
        return [
            *held.image.unchanged,
            ValueEquals(lease_key, held.lease.encode()),
            LeaseEquals(lease_key, held.etcd_lease),
        ]

    def _lease_found(self, put: Put) -> Callable[[], int | None]:
        """Return the `found` of a proposal that takes a lease; no other writes its value."""

        def found() -> int | None:
            item = self._etcd.get(put.key)
            if item is None or (item.value, item.lease) != (put.value, put.lease):
                return None
            return item.mod_revision

        return found

    def _explain(self, held: Held, *, lease_may_be_gone: bool = False) -> NoReturn:
        """Say why a holder's transaction did not hold."""
        known = held.record
        current = self.lease_of(known.id)
        now = read(self._etcd, ImageRecord, keys.image(known.id))
        if now is None:
            if self._etcd.get(keys.tombstone(known.id)) is None:
                raise HistoryLost(known.id, (known.epoch, known.generation), (0, 0))
            raise LeaseLost(known.id, None)
        found = now.record
        if found.is_behind(known):
            raise HistoryLost(
                known.id, (known.epoch, known.generation), (found.epoch, found.generation)
            )
        if current is not None and current.record != held.lease:
            raise LeaseLost(known.id, current.record.gateway)
        if found.epoch > known.epoch or (current is None and not lease_may_be_gone):
            raise LeaseLost(known.id, None)
        item = self._etcd.get(keys.lease(known.id))
        if item is not None and item.lease != held.etcd_lease:
            raise LeaseMoved(known.id)
        raise RecordChanged(f"image {known.id}")


def no_clones(image: ImageId, from_layer: int = 0, to_layer: int | None = None) -> RangeEmpty:
    """Return what holds while no clone begins on these layers of an image, both ends included."""
    start = keys.clones_of_layer(image, from_layer)
    last = keys.clones(image) if to_layer is None else keys.clones_of_layer(image, to_layer)
    return RangeEmpty(start, keys.end_of(last))


def _unused(before: ImageRecord, after: ImageRecord) -> tuple[RangeEmpty, ...]:
    """Return what has to hold for snapshots to go; one that is withdrawn nobody could clone."""
    gone = [each.layer for each in before.snapshots if each not in after.snapshots]
    withdrawn = len(after.layers) < len(before.layers) and after.next_layer == before.next_layer
    if not gone or withdrawn:
        return ()
    return (no_clones(before.id, min(gone), max(gone)),)


def _check_layers(before: ImageRecord, after: ImageRecord) -> None:
    """Assert that layers stay, or change as what is done to them does it."""
    size_stays = after.size_bytes == before.size_bytes
    if after.next_layer != before.next_layer:
        _check_new_top(before, after)
    elif after.layers == before.layers:
        assert size_stays, "the size is changed by `resize`"
        gone = [each for each in before.snapshots if each not in after.snapshots]
        kept = tuple(each for each in before.snapshots if each not in gone)
        assert after.snapshots == kept, "the others stay"
        assert len(gone) <= 1, "one is removed at a time"
        merged = {*before.merging, *(each.layer for each in gone)}
        assert set(after.merging) == merged, "a layer without its snapshot is merged"
    elif after.snapshots == before.snapshots:
        moved = set(before.layer_ids) ^ set(after.layer_ids)
        assert size_stays and after.layers[0] == before.layers[0], "the top stays"
        assert moved == set(before.merging) ^ set(after.merging), "a merged layer goes, or is back"
    else:
        assert size_stays and after.merging == before.merging, "nothing else changes"
        assert after.layers == before.layers[1:], "the top goes"
        assert after.snapshots == before.snapshots[:-1], "with the last snapshot"


def _check_new_top(before: ImageRecord, after: ImageRecord) -> None:
    top, *below = after.layers
    assert before.next_layer <= top.id < after.next_layer, "no layer's id is used twice"
    if tuple(below) == before.layers:
        assert len(after.snapshots) == len(before.snapshots) + 1, "with one snapshot"
        assert after.snapshots[:-1] == before.snapshots, "beside those that there are"
        same = (after.size_bytes, after.merging) == (before.size_bytes, before.merging)
        assert same, "and nothing else"
        return
    assert after.snapshots, "one goes back to a snapshot"
    last = after.snapshots[-1]
    assert after.snapshots == before.snapshots[: len(after.snapshots)], "newer ones go"
    assert [layer.id for layer in below] == before.chain(last), "and the layers above"
    assert after.size_bytes == last.size_bytes, "and the image has its size"
    assert set(after.merging) == set(before.merging) & {layer.id for layer in below}, "merged on"
