"""Goals, and what becomes of them."""

from bench.goals import at_least, at_most, tally


def test_goal_that_is_just_reached_is_met() -> None:
    assert at_least("speed", 0.45, 0.45).is_met
    assert at_most("time", 80, 80).is_met


def test_goal_that_is_not_reached_is_missed() -> None:
    assert at_least("speed", 0.449, 0.45).text == "≥ 0.45: missed"
    assert at_most("time", 80.1, 80).text == "≤ 80: missed"


def test_goal_of_what_was_not_measured_is_neither() -> None:
    verdict = at_least("speed", None, 5)
    assert verdict.is_met is None
    assert verdict.text == "≥ 5"
    assert verdict.as_json()["is_met"] is None


def test_tally_names_what_was_missed() -> None:
    verdicts = [at_least("a", 1, 1), at_least("b", 0, 1), at_most("c", None, 1)]
    assert tally(verdicts) == "1 of 2 goals met, 1 not measured; missed: b"
    assert tally(verdicts[:1]) == "1 of 1 goals met"
