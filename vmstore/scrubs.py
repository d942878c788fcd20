"""The records of scrubs: read by who shows them, changed by who asks for one and who makes it."""

from collections.abc import Callable

from etcd import keys
from etcd.interface import Compare, Delete, Etcd, KeyAbsent, Put
from etcd.scrubs import ScrubRecord
from shard.ids import ImageId
from vmstore.errors import RecordChanged
from vmstore.stored import Stored, commit, decided_anew, put_found, read, stored


class ScrubRecords:
    """Reads and changes the records of scrubs. `_etcd` is where they stand.

    All methods raise EtcdUnavailable, changing ones also OutcomeUnknown and RecordChanged.
    """

    _etcd: Etcd

    def scrubs(self) -> dict[ImageId, Stored[ScrubRecord]]:
        """Return how the scrubs of all images stand that have a record."""
        return {
            ImageId(item.key.removeprefix(keys.SCRUBS)): stored(ScrubRecord, item)
            for item in self._etcd.get_prefix(keys.SCRUBS).items
        }

    def scrub_of(self, image: ImageId) -> ScrubRecord:
        """Return how the scrub of an image stands."""
        found = read(self._etcd, ScrubRecord, keys.scrub(image))
        return found.record if found is not None else ScrubRecord(image=image)

    @decided_anew
    def change_scrub(
        self, image: ImageId, change: Callable[[ScrubRecord], ScrubRecord]
    ) -> ScrubRecord:
        """Have `change` made to an image's record, which may be made by that; return it."""
        found = read(self._etcd, ScrubRecord, keys.scrub(image))
        before = found.record if found is not None else ScrubRecord(image=image)
        after = change(before)
        if found is not None and after == before:
            return before
        compares: tuple[Compare, ...] = (KeyAbsent(after.key),)
        if found is not None:
            compares = found.unchanged
        put = Put(after.key, after.encode())
        if commit(self._etcd, compares, [put], put_found(self._etcd, put)) is None:
            raise RecordChanged(f"the scrub of image {image}")
        return after

    def ask_for_scrub(self, image: ImageId, now_ms: int) -> ScrubRecord:
        """Ask for a scrub; one that is under way is that."""

        def asked(record: ScrubRecord) -> ScrubRecord:
            times = record.times
            if times.is_under_way or times.is_asked:
                return record
            return record.asked(now_ms)

        return self.change_scrub(image, asked)

    def stop_scrub(self, image: ImageId, now_ms: int) -> bool:
        """Ask for the end of a scrub; False: there is none, nor one asked for."""
        stopped = False

        def stop(record: ScrubRecord) -> ScrubRecord:
            nonlocal stopped
            times = record.times
            stopped = times.is_under_way or times.is_asked
            return record.stopped(now_ms) if stopped else record

        self.change_scrub(image, stop)
        return stopped

    def forget_scrub(self, known: Stored[ScrubRecord]) -> None:
        """Remove the record of an image that is gone."""
        absent = KeyAbsent(known.key)
        commit(self._etcd, known.unchanged, [Delete(known.key)], lambda: self._gone(absent))

    def _gone(self, absent: KeyAbsent) -> int | None:
        return 1 if self._etcd.get(absent.key) is None else None
