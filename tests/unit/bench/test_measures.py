"""What measures make of what they took, all of it or a part."""

import json

import pytest

from bench.failures import HEALED_CASE, Failures
from bench.first_writes import CASES, LOGS, FirstWrites, Pair
from bench.guest import InGuest
from bench.many_images import EACH, ONE, SHARED, ManyImages
from bench.measure import Measure, Setting
from bench.opening import Case, Opening
from bench.report import Section
from bench.run import MEASURES
from bench.workloads import WORKLOADS
from tests.tools import guest_speed
from tests.unit.bench.results import measurement


def whole(measure: Measure) -> Section:
    """A measure's section: in its tables each title has its cells, and its figures are JSON."""
    section = measure.section()
    assert section is not None
    for table in section.tables:
        assert {len(line) for line in table.lines} == {len(table.header)}
    json.dumps(section.figures)
    json.dumps([verdict.as_json() for verdict in section.verdicts])
    return section


@pytest.mark.parametrize("name", MEASURES)
def test_measure_that_took_nothing_has_no_section(name: str, setting: Setting) -> None:
    assert MEASURES[name](setting).section() is None


def test_eight_images_are_judged_by_their_sum(setting: Setting) -> None:
    measure = ManyImages(setting)
    measure.taken["4k random write", ONE] = [measurement(100), measurement(90), measurement(110)]
    measure.taken["4k random write", SHARED] = [measurement(99)]
    measure.taken["4k random write", EACH] = [measurement(101)]
    judged = {verdict.what: verdict.is_met for verdict in whole(measure).verdicts}
    assert judged == {
        "4k random write, eight, depth 4 each": False,
        "4k random write, eight, depth 32 each": True,
        "4k random read, eight, depth 4 each": None,
        "4k random read, eight, depth 32 each": None,
    }


def test_cost_of_a_first_write_is_the_median_of_its_rounds(setting: Setting) -> None:
    measure = FirstWrites(setting)
    over = measurement(100)
    measure.taken[CASES[0], LOGS[0]] = [
        Pair(measurement(iops), over) for iops in (100, 40, 50, 10, 200)
    ]
    (verdict,) = whole(measure).verdicts
    assert verdict.figure == pytest.approx(2)
    assert verdict.is_met


def test_what_is_kept_beside_a_heal_is_judged(setting: Setting) -> None:
    measure = Failures(setting)
    work = "randwrite 4k depth 32"
    measure.taken[work, "healthy"] = [measurement(100)]
    measure.taken[work, "degraded"] = [measurement(80)]
    assert whole(measure).tables[0].lines[0] == [work, "100", "80", "0.80"]
    case = next(case for case in guest_speed.CASES if case.name == HEALED_CASE)
    measure.healing = guest_speed.Row(case, [100, 100], [69, 69], [30])
    (verdict,) = whole(measure).verdicts
    assert (verdict.figure, verdict.is_met) == (0.69, False)


def test_opens_show_median_and_worst(setting: Setting) -> None:
    measure = Opening(setting)
    measure.cases = [
        Case("none", gateway_mib=60, node_mib=50),
        Case("1 of 1G", [1.0, 2.0, 30.0], [2.0, 3.0, 31.0], 61, 51),
    ]
    assert whole(measure).tables[0].lines == [
        ["none", "-", "-", "60", "50"],
        ["1 of 1G", "2.0 (30.0)", "3.0 (31.0)", "61", "51"],
    ]


def test_a_guest_is_compared_with_its_peer(setting: Setting) -> None:
    measure = InGuest(setting)
    name = WORKLOADS[0].name
    measure.taken[name, "hci"] = [measurement(90)]
    measure.taken[name, "qemu-nbd"] = [measurement(100)]
    assert whole(measure).tables[0].lines[0][:4] == [name, "90", "100", "0.90"]
