"""What travels in a heal, on a small image; `make heal` does the same with 20 GiB."""

from __future__ import annotations

import json
from pathlib import Path

from tests.tools import heal


def test_heal_moves_what_was_missed_and_little_more(tmp_path: Path) -> None:
    found = tmp_path / "heal.json"
    arguments = ["--filled", "128", "--rewritten", "32", "--json", str(found)]
    heal.main(arguments)  # its exit code is of figures too, which other tests beside it may spoil
    figures = json.loads(found.read_text())
    assert 32 <= figures["copied_mib"] <= 32 * heal.MOST_MOVED
    # Beside the data there are summaries of shards, which weigh more in so small an image.
    assert figures["received_mib"] <= 1.3 * 32
    assert max(figures["missed_nothing_s"]) < 10 * heal.IN_SYNC_S
