"""The clock on the wall may jump: it is shown to people, and nothing is decided by it."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

WALL = re.compile(
    r"time\.time(_ns)?\(|\bCLOCK_REALTIME\b|\bdatetime\.(now|utcnow|today)\(|"
    r"\bSystemTime\b|\bgettimeofday\b|\bUtc::now\b"
)

SHOWN = {"vmstore/channels.py": 1, "hci/gateway.py": 2, "hci/cli/scrub.py": 1}
"""Where it is asked, and how often: when a heal was finished, for `hci heal status`; when an image
was scrubbed and when somebody asked for that, over weeks and restarts of all hosts; when a snapshot
was taken, for lists of them. A jump makes the next scrub by schedule early or late, and changes
nothing else."""


def test_wall_clock_is_asked_only_for_what_people_read() -> None:
    sources = [
        path
        for folder in ("hci", "vmstore", "etcd", "arbiter", "shard", "engine/core/src", "engine/py")
        for pattern in ("*.py", "*.rs")
        for path in sorted((ROOT / folder).rglob(pattern))
        if "target" not in path.parts
    ]
    assert len(sources) > 100
    found = {
        path.relative_to(ROOT).as_posix(): len(WALL.findall(path.read_text()))
        for path in sources
        if WALL.search(path.read_text())
    }
    assert found == SHOWN
