"""What nodes say of themselves when they are asked, judged against the cluster's record. Pure.

Never believed are a record in etcd that a node in sync knows to be outdated (etcd was rolled back),
one that was rebuilt without what a node knows, and a store that has lost what its node or its peers
know it had.
"""

from collections.abc import Iterable

from etcd.images import ImageRecord
from vmstore.events import Peeked
from vmstore.history import is_missed


def problem_of(peeked: Peeked, ours: ImageRecord) -> str | None:
    """Return why the cluster's record cannot be trusted, if a node knows better."""
    if peeked.deleted:
        return f"{peeked.node} holds a tombstone of this image: etcd was rolled back"
    view = peeked.record
    if view is None:
        return None
    later = (
        view.epoch > ours.epoch
        or (view.epoch == ours.epoch and view.holder != ours.holder)
        or view.generation > ours.generation
        or (view.generation == ours.generation and view.digest != ours.digest)
    )
    if later and peeked.node in ours.membership.all_in_sync():
        return (
            f"{peeked.node} holds a later record (epoch {view.epoch}, generation "
            f"{view.generation}) than etcd (epoch {ours.epoch}, generation "
            f"{ours.generation}): etcd was rolled back"
        )
    if is_missed(ours, view.epoch, view.generation):
        return (
            f"{peeked.node} holds a record (epoch {view.epoch}, generation {view.generation}) that "
            "the forced recovery of this image did not know: run `hci cluster recover` again"
        )
    return None


def emptied(known: Iterable[Peeked]) -> set[str]:
    """Return the nodes whose store is not the one it was: emptied, swapped, rolled back.

    Without a record where others hold something, with a flush number below what a peer was told,
    or by its own word: everything on it is stale since 0. Who has neither dirty shards nor heard
    of a flush holds nothing: an open of a new image that was cut short gave a record to some nodes
    only.
    """
    known = list(known)
    records = [peeked.record for peeked in known if peeked.record is not None]
    written = any(record.dirty or record.peers for record in records)
    claims: dict[str, int] = {}
    for record in records:
        for name, number in record.peers.items():
            claims[name] = max(number, claims.get(name, 0))
    return {
        peeked.node
        for peeked in known
        if (peeked.record is None and written)
        or (peeked.record is not None and peeked.record.distrusted)
        or peeked.flush_number < claims.get(peeked.node, 0)
    }
