"""The messages of arbiter.proto, to and from what the code works with.

What comes from outside is checked here: `ValueError` or `BadValue` says what is wrong with it.
"""

from arbiter import arbiter_pb2 as pb
from arbiter.exchange import Addressee, Reply, Verdict
from arbiter.statement import SETS_MAX, Statement
from arbiter.vote import Refusal
from shard.ids import holder_id, node_name

MEMBERS_MAX = 16
"""Nodes of one replica set; a pair has two, and nothing this arbiter serves has more than a few."""

_VERDICTS = {
    Verdict.GRANTED: pb.VoteReply.VERDICT_GRANTED,
    Verdict.REFUSED: pb.VoteReply.VERDICT_REFUSED,
    Verdict.OTHER_ARBITER: pb.VoteReply.VERDICT_OTHER_ARBITER,
    Verdict.BEHIND: pb.VoteReply.VERDICT_BEHIND,
    Verdict.FAILED: pb.VoteReply.VERDICT_FAILED,
}
_BY_NUMBER = {number: verdict for verdict, number in _VERDICTS.items()}


def addressee_message(to: Addressee) -> pb.Addressee:
    """Return the message of an addressee."""
    return pb.Addressee(arbiter_id=to.arbiter, start_counter=to.start_counter, changes=to.changes)


def addressee_of(message: pb.Addressee) -> Addressee:
    """Return the addressee of a message."""
    return Addressee(message.arbiter_id, message.start_counter, message.changes)


def statement_message(stated: Statement) -> pb.Statement:
    """Return the message of a statement."""
    return pb.Statement(
        epoch=stated.epoch,
        holder_id=stated.holder,
        generation=stated.generation,
        sets=[pb.InSync(nodes=sorted(nodes)) for nodes in stated.in_sync],
    )


def statement_of(message: pb.Statement) -> Statement:
    """Return the statement of a message from outside. Raises ValueError, BadValue."""
    if message.epoch < 1 or message.generation < 1:
        raise ValueError("epoch and generation are at least 1")
    if not 1 <= len(message.sets) <= SETS_MAX:
        raise ValueError(f"a statement names 1 to {SETS_MAX} replica sets")
    in_sync = []
    for each in message.sets:
        if not 1 <= len(each.nodes) <= MEMBERS_MAX:
            raise ValueError(f"a replica set has 1 to {MEMBERS_MAX} nodes in sync")
        in_sync.append(frozenset(node_name(node) for node in each.nodes))
    return Statement(
        message.epoch, holder_id(message.holder_id), message.generation, tuple(in_sync)
    )


def reply_message(reply: Reply) -> pb.VoteReply:
    """Return the message of a reply."""
    return pb.VoteReply(
        verdict=_VERDICTS[reply.verdict],
        refusal=reply.refusal.name if reply.refusal is not None else "",
        detail=reply.detail or (reply.refusal.value if reply.refusal is not None else ""),
        changes=reply.changes,
    )


def reply_of(message: pb.VoteReply) -> Reply:
    """Return the reply of a message; what this version does not know is a failure to vote."""
    verdict = _BY_NUMBER.get(message.verdict, Verdict.FAILED)
    refusal = Refusal.__members__.get(message.refusal)
    if verdict is Verdict.REFUSED and refusal is None:
        verdict = Verdict.FAILED
    return Reply(verdict, message.changes, refusal, message.detail)
