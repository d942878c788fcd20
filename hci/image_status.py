"""What a gateway tells of an image that it has open: how it is served, by whom, what goes on in it.

It is put together from what the image's holder knows and what the engine says of it, and changes
neither.
"""

import time
from typing import Any

from hci import control_pb2 as pb
from vmstore.exports import Exports
from vmstore.holder import Holder, closing_waits_for
from vmstore.open_image import OpenImage
from vmstore.standing import Phase

SCRUB_COUNTERS = ("next_shard", "shards_done", "shards_left", "read_bytes", "found", "repaired")
"""What is told of a scrub under way, each with `scrub_` before it."""

_STATES = {
    Phase.TAKING: pb.OpenImage.STATE_OPENING,
    Phase.GATHERING: pb.OpenImage.STATE_OPENING,
    Phase.JOINING: pb.OpenImage.STATE_OPENING,
    Phase.SERVING: pb.OpenImage.STATE_SERVING,
    Phase.CLOSING: pb.OpenImage.STATE_CLOSING,
    Phase.RELEASING: pb.OpenImage.STATE_CLOSING,
    Phase.ENDED: pb.OpenImage.STATE_CLOSING,
}


def image_status(image: OpenImage, seen: dict[str, Any], exports: Exports) -> pb.OpenImage:
    """Return an image's status; `seen` is what the engine says of it."""
    holder, record = image.holder, image.holder.record
    status = pb.OpenImage(
        image_id=image.image,
        name=str(image.name),
        state=_STATES[holder.phase],
        trouble=holder.trouble,
        clients=sum(1 for user in image.users if user > 0),
        heal=_progress(image, seen.get("heal"), exports),
        counters=_counters(seen),
        slow=_slow(holder),
    )
    if record is None:
        return status
    membership = record.membership
    status.epoch, status.generation = record.epoch, record.generation
    for index in range(len(record.sets)):
        status.in_sync.add(replica_set=index, nodes=membership.in_sync(index))
    stalled_by = holder.stalled_by()
    if holder.phase is Phase.SERVING and holder.trouble and _waits_for_a_change(holder):
        # Its writes are answered once etcd and the arbiter have taken the change.
        status.state = pb.OpenImage.STATE_READS_ONLY
    if holder.phase is Phase.SERVING and stalled_by:
        status.state = pb.OpenImage.STATE_READS_ONLY
        status.trouble = status.trouble or f"writes wait for {', '.join(stalled_by)}"
    if holder.phase is Phase.CLOSING and stalled_by:
        status.trouble = f"it waits {closing_waits_for(holder)}"
    return status


def _progress(
    image: OpenImage, heal: dict[str, Any] | None, exports: Exports
) -> pb.Progress | None:
    begun = exports.heal_log.under_way(image.image)
    if heal is None or begun is None:
        return None
    seconds = max(0.1, time.monotonic() - begun.begun_s)
    return pb.Progress(
        node=heal["node"],
        shards_done=heal["shards_done"],
        shards_total=heal["shards_done"] + heal["shards_left"],
        copied_bytes=heal["bytes_done"],
        bytes_left=heal["bytes_left"],
        bytes_per_second=int(heal["bytes_done"] / seconds),
        bad_blocks=heal["bad_blocks"],
    )


def _counters(seen: dict[str, Any]) -> dict[str, int]:
    """Return what is told of an image's levelling, rot and scrub while there is any."""
    level, scrub = seen.get("level"), seen.get("scrub")
    counters = {f"levelling_{name}": count for name, count in (level or {}).items()}
    if (rot := seen.get("rot")) is not None:
        counters |= {f"rot_{what}": rot[what] for what in ("found", "repaired", "waiting")}
        counters["rot_unrepairable"] = len(rot["unrepairable"])
    if scrub is not None:
        counters |= {f"scrub_{what}": scrub[what] for what in SCRUB_COUNTERS}
    return counters


def _slow(holder: Holder) -> list[pb.SlowNode]:
    """Return the nodes that keep clients waiting, and those that rest because they did."""
    slowness = holder.slowness
    slow = [pb.SlowNode(node=node, lag_ms=lag) for node, lag in sorted(slowness.slow().items())]
    resting = sorted(slowness.resting(holder.now_s).items())
    return [*slow, *(pb.SlowNode(node=node, rests_s=rests_s) for node, rests_s in resting)]


def _waits_for_a_change(holder: Holder) -> bool:
    """Whether a node is missing that etcd, or the arbiter, has not let the image leave behind."""
    delayed = holder.proposal is not None or holder.retry_at_s is not None
    return delayed and bool(holder.missing())
