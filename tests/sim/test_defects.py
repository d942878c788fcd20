"""Each rule of the protocol can be broken on purpose, and random histories notice."""

from __future__ import annotations

import pytest

from engine._engine import Simulation
from tests.sim.defects import DEFECTS, Defect, catch
from tests.sim.history import History


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name.replace(" ", "-"))
def test_broken_rule_is_noticed_within_its_number_of_histories(defect: Defect) -> None:
    count, outcome = catch(defect, defect.within, first=defect.at)
    assert outcome is not None, f"{count} histories of kind {defect.kind} notice nothing"
    print(f"{defect.name}: history {count}, {outcome.error}")
    assert History(outcome.seed).play().error is None, "with the rule kept the same seed passes"


def test_each_defect_says_what_notices_it() -> None:
    assert [defect.name for defect in DEFECTS if not defect.match] == []


def test_names_of_broken_rules_are_those_of_the_engine() -> None:
    named = {rule for defect in DEFECTS for rule in defect.rules}
    assert named <= set(Simulation.rules())
