"""When a member that was started may be called healthy, and what to say where it is not.

What speaks to members is imported where it is used: the members start meanwhile.
"""

import json
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hci.config import Config, Endpoint
from hci.dev import process
from hci.errors import ControlError, DevError
from shard.errors import HciError
from shard.membership import Policy

if TYPE_CHECKING:
    from hci.dev.cluster import Member

PATIENCE_S = 60.0
"""A node that was killed replays its log first, at the speed of its disk. A hang detector."""

_POLL_S = 0.05
_ASK_S = 2.0


class _NotYet(Exception):
    """Not healthy, for the reason given."""


def wait(
    config: Config, members: "Sequence[Member]", started: "Mapping[str, subprocess.Popen[bytes]]"
) -> None:
    """Return when all are healthy. Raises DevError for the first that ends or takes too long."""
    deadline = time.monotonic() + PATIENCE_S
    for member in members:
        _wait_for(
            member.name,
            lambda member=member: _check(config, member),  # type: ignore[misc]
            started[member.name],
            member.log,
            deadline,
        )


def wait_for_socket(path: Path, started: "subprocess.Popen[bytes]", log: Path) -> None:
    """Return when the holder listens at `path`, which it does a moment after the path is there."""

    def check() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(str(path))
            except OSError as error:
                raise _NotYet(f"nobody listens at {path}: {error}") from error

    _wait_for("holder", check, started, log, time.monotonic() + PATIENCE_S)


def ensure_cluster(config: Config) -> None:
    """Make the cluster's record, unless it is there. Raises OtherCluster where another's is."""
    from hci.connect import catalog

    with catalog(config, may_be_empty=True) as records:
        records.init_cluster(config.cluster.id)


def ensure_pool(config: Config) -> None:
    """Create the cluster's pool, unless it is there."""
    from hci.connect import catalog

    assert config.dev is not None, "only a dev cluster has a pool of its own"
    with catalog(config) as records:
        if config.dev.pool in records.pools() or records.lost() is not None:
            return
        arbiter = next(iter(config.arbiters), None)
        policy = Policy.REPLICA_3 if arbiter is None else Policy.THIN_ARBITER
        records.create_pool(config.dev.pool, policy=policy, arbiter=arbiter)


def _wait_for(
    name: str,
    check: Callable[[], None],
    started: "subprocess.Popen[bytes]",
    log: Path,
    deadline: float,
) -> None:
    while True:
        status = started.poll()
        if status is not None:
            reason = f"ended by signal {-status}" if status < 0 else f"ended with status {status}"
            raise DevError(_failure(name, reason, log))
        try:
            return check()
        except _NotYet as reason:
            if time.monotonic() > deadline:
                late = f"is not healthy after {PATIENCE_S:.0f} s ({reason})"
                raise DevError(_failure(name, late, log)) from reason
        time.sleep(_POLL_S)


def _failure(name: str, reason: str, log: Path) -> str:
    line = process.last_line(log)
    return f"{name} {reason}{': ' + line if line else ''} (log: {log})"


def _check(config: Config, member: "Member") -> None:
    try:
        if member.kind == "etcd":
            _check_etcd(config.cluster.etcd[0])
        elif member.kind == "node":
            _check_node(config, member.name)
        elif member.kind == "arbiter":
            _check_arbiter(config, member.name)
        else:
            _check_gateway(config, member.name)
    except HciError as error:
        raise _NotYet(str(error)) from error


def _check_etcd(endpoint: Endpoint) -> None:
    import http.client

    connection = http.client.HTTPConnection(endpoint.host, endpoint.port, timeout=_ASK_S)
    try:
        connection.request("GET", "/health")
        answer = json.loads(connection.getresponse().read())
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _NotYet(f"no answer at {endpoint}: {error}") from error
    finally:
        connection.close()
    if answer.get("health") != "true":
        raise _NotYet(f"it says {answer}")


def _check_node(config: Config, name: str) -> None:
    from hci import control_pb2 as pb
    from hci.connect import catalog
    from hci.control import NodeClient

    with NodeClient(name, config.node(name).control, deadline_s=_ASK_S) as client:
        status = client.status()
    if status.cluster_id != config.cluster.id:
        raise ControlError("a node of another cluster answers", name, str(client.address))
    if status.history_lost:
        return  # It runs, and says what to do; it registers once etcd is recovered.
    if status.state != pb.NodeStatus.STATE_SERVING:
        raise _NotYet(status.trouble or "it is starting")
    with catalog(config) as records:
        if name not in records.alive():
            raise _NotYet("it is not registered in etcd")


def _check_arbiter(config: Config, name: str) -> None:
    from arbiter import arbiter_pb2 as pb
    from hci.connect import arbiter_client

    with arbiter_client(name, config.arbiter(name).listen, deadline_s=_ASK_S) as client:
        status = client.status()
    if (status.cluster_id, status.name) != (config.cluster.id, name):
        raise ControlError("another arbiter answers", name, client.address)
    if status.history_lost:
        return
    if status.state != pb.ArbiterStatus.STATE_SERVING:
        raise _NotYet(status.trouble or "it is starting")


def _check_gateway(config: Config, name: str) -> None:
    from hci import control_pb2 as pb
    from hci.control import GatewayClient

    with GatewayClient(name, config.gateway(name).control, deadline_s=_ASK_S) as client:
        status = client.status()
    if status.state != pb.GatewayStatus.STATE_SERVING:
        raise _NotYet(status.trouble or "it is starting")
