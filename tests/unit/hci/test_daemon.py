"""What the daemons share."""

import subprocess
import sys
import threading

import pytest

from etcd.errors import EtcdError, EtcdUnavailable
from hci import daemon


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch) -> daemon.Ending:
    monkeypatch.setattr(daemon, "RETRY_S", 0.0)
    monkeypatch.setattr(daemon.signal, "signal", lambda _number, _handler: None)
    return daemon.Ending()


def test_step_that_was_taken_is_not_taken_again_where_the_next_one_waits(
    ending: daemon.Ending,
) -> None:
    # The gateway began to serve, then etcd did not answer the watch on the nodes: the next attempt
    # began a second thread that decides beside the first.
    taken: list[str] = []
    failures = [EtcdUnavailable(("e:1",), "a test")] * 2
    heard: list[EtcdError] = []

    def watch() -> None:
        if failures:
            raise failures.pop()
        taken.append("watch")

    steps = (lambda: taken.append("start"), watch, lambda: taken.append("link"))
    assert daemon.take_steps(steps, ending, heard.append) == 3
    assert taken == ["start", "watch", "link"]
    assert len(heard) == 2


def test_steps_end_when_it_is_time_to_end(ending: daemon.Ending) -> None:
    started = threading.Event()

    def never() -> None:
        ending.fail("a test")
        raise EtcdUnavailable(("e:1",), "a test")

    assert daemon.take_steps((started.set, never), ending, lambda _error: None) == 1
    assert started.is_set()


def test_daemon_may_open_as_many_files_as_the_host_lets_it() -> None:
    # With the usual 1,024 a gateway ran out at its thousandth disk, and then took a whole core for
    # connections that it could not accept.
    program = (
        "import resource; from hci import daemon; daemon.take_files(); "
        "print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    command = f"ulimit -Sn 1000; ulimit -Hn 5000; exec {sys.executable} -c '{program}'"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["5000", "5000"]
