"""Each of the design's histories has its scenario and its broken rule, and the page says which."""

from __future__ import annotations

from tests.sim.coverage import BEGIN, END, HISTORIES, INVARIANTS, PAGE, WITHIN, scenario_names, text

NOT_BUILT = ("12",)
"""Histories of placement that moves."""


def test_page_says_what_is_covered() -> None:
    page = PAGE.read_text()
    stands = page.split(BEGIN)[1].split(END)[0].strip()
    assert stands == text(), "run `python -m tests.sim.coverage`"


def test_each_history_and_invariant_is_covered_or_says_what_it_waits_for() -> None:
    assert [each.number for each in HISTORIES] == [str(number) for number in range(1, 22)]
    assert [each.number for each in INVARIANTS] == [str(number) for number in range(1, 10)]
    for each in HISTORIES:
        if each.waits_for:
            assert each.number in NOT_BUILT, f"{each.title}: what it waits for is built"
            continue
        assert each.scenarios, f"{each.title}: no scenario plays it"
        assert each.broken, f"{each.title}: no scenario plays it with its rule broken"
        by_chance = any(WITHIN[name] for name in each.defects)
        assert by_chance, f"{each.title}: no history by chance notices"
    for each in INVARIANTS:
        assert any(WITHIN[name] for name in each.defects), f"{each.title}: nothing breaks it"


def test_what_covers_exists_and_every_defect_covers_something() -> None:
    known = set(scenario_names())
    for each in (*HISTORIES, *INVARIANTS):
        missing = {*each.scenarios, *each.broken} - known
        assert not missing, f"{each.title}: there is no {missing}"
    named = {name for each in (*HISTORIES, *INVARIANTS) for name in each.defects}
    assert named == set(WITHIN), "defects that cover nothing, or are not there"
