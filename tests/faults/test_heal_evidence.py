"""What travels in a heal, and what guests keep of their speed beside it, on small images.

`make heal` does the same with 20 GiB and longer windows, against the goals. The limits here are no
measure of speed: tests run beside each other, and a guest that is not starved passes.
"""

from __future__ import annotations

import json
from pathlib import Path

from tests.tools import guest_speed, heal

LIMITS = ("--most-moved", "1.3", "--in-sync", "10", "--least-kept", "0.1")
SMALL = ("--filled", "128", "--rewritten", "32", "--rounds", "1", "--window", "1", "--rate", "32")


def test_heal_moves_what_was_missed_and_leaves_guests_their_speed(tmp_path: Path) -> None:
    found = tmp_path / "heal.json"
    code = heal.main([*SMALL, *LIMITS, "--json", str(found)])
    figures = json.loads(found.read_text())
    assert code == 0, figures
    assert 32 <= figures["copied_mib"] <= 32 * heal.MOST_MOVED
    cases = {row["case"]: row for row in figures["guest_speed"]}
    assert set(cases) == {case.name for case in guest_speed.CASES}
    # A heal that stands still would leave guests all of their speed.
    assert all(min(row["healed_mib_per_s"]) > 0 for row in cases.values()), cases


def test_a_missed_goal_ends_the_tool_with_an_error() -> None:
    row = guest_speed.Row(guest_speed.CASES[0], [1000.0, 990.0, 10.0], [600.0, 690.0, 980.0], [1.0])
    assert 0.69 < row.ratio < 0.70
    assert "missed" in guest_speed.table([row], 0.7)
    (line,) = guest_speed.report([row], 0.7)
    assert not line["is_met"]
    assert guest_speed.report([row], 0.6)[0]["is_met"]
