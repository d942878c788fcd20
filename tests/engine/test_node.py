"""The data path of a storage node, as its daemon uses it."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from engine import Node

LOG_BYTES = 32 << 20
ASKERS = 3


def opened(folder: Path) -> Node:
    return Node(
        str(folder),
        cluster="c" * 32,
        name="node1",
        new_store_id="d" * 32,
        boot="b" * 32,
        log_bytes=LOG_BYTES,
    )


def test_node_that_is_asked_while_it_stops_may_be_opened_again(tmp_path: Path) -> None:
    # Whoever asked had it too, and the store was still open for as long.
    nodes, enough = [opened(tmp_path)], threading.Event()

    def ask() -> None:
        while not enough.is_set():
            # It is stopped, or ended before it came to this.
            with contextlib.suppress(RuntimeError, TimeoutError):
                nodes[-1].status()

    with ThreadPoolExecutor(ASKERS) as pool:
        asking = [pool.submit(ask) for _ in range(ASKERS)]
        try:
            for start in range(20):
                nodes[-1].stop()
                nodes.append(opened(tmp_path))
                assert nodes[-1].start_counter == start + 2
        finally:
            enough.set()
            nodes[-1].stop()
        for each in asking:
            each.result()
