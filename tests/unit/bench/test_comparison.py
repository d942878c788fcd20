"""Rows, their goals and their tables."""

import pytest

from bench.comparison import rows, tables, verdicts
from bench.report import Section, markdown
from bench.workloads import WORKLOADS
from tests.unit.bench.results import measurement

WRITE_1, READ_32 = WORKLOADS[0], WORKLOADS[3]
SYSTEMS = ["hci", "nbdkit", "gluster"]


def test_rows_have_medians_and_their_ratios() -> None:
    taken = {
        (WRITE_1.name, "hci"): {1: measurement(50), 2: measurement(60), 3: measurement(10)},
        (WRITE_1.name, "nbdkit"): {1: measurement(100), 2: measurement(200), 3: measurement(90)},
    }
    ours, theirs = rows(WORKLOADS, SYSTEMS, taken)
    assert (ours.iops, theirs.iops) == (50, 100)
    assert (ours.ratio_nbdkit, ours.ratio_gluster) == (0.5, None)
    assert ours.round_ratios_nbdkit == pytest.approx((0.5, 0.3, 1 / 9))


def test_rows_compare_rounds_in_which_both_were_measured() -> None:
    taken = {
        (WRITE_1.name, "hci"): {1: measurement(50), 3: measurement(80)},
        (WRITE_1.name, "nbdkit"): {2: measurement(100), 3: measurement(100)},
    }
    assert rows(WORKLOADS, SYSTEMS, taken)[0].round_ratios_nbdkit == (0.8,)


def test_goals_of_both_peers_are_judged_apart() -> None:
    taken = {
        (WRITE_1.name, "hci"): {1: measurement(46)},
        (WRITE_1.name, "nbdkit"): {1: measurement(100)},
        (WRITE_1.name, "gluster"): {1: measurement(10)},
    }
    judged = {
        each.what: each.is_met for each in verdicts([WRITE_1], rows([WRITE_1], SYSTEMS, taken))
    }
    assert judged == {
        f"{WRITE_1.name} ÷ nbdkit": True,
        f"{WRITE_1.name} ÷ gluster": False,
        f"{WRITE_1.name}: p99 ÷ median": True,
    }


def test_goals_of_latency_and_processor_time_are_judged() -> None:
    slow = measurement(10, median_us=100, p99_us=401, cpu_us=25.1)
    taken = {(WRITE_1.name, "hci"): {1: slow}, (READ_32.name, "hci"): {1: slow}}
    chosen = [WRITE_1, READ_32]
    missed = [v.what for v in verdicts(chosen, rows(chosen, ["hci"], taken)) if v.is_met is False]
    assert missed == [
        f"{WRITE_1.name}: p99 ÷ median",
        f"{READ_32.name}: µs CPU an operation",
    ]


def test_every_row_has_both_goals_and_the_processor_time_is_bound_at_depth_32() -> None:
    assert len(WORKLOADS) == 8
    assert all(w.goal_nbdkit > 0 and w.goal_gluster > 1 for w in WORKLOADS)
    bound = {w.name: w.most_cpu_us for w in WORKLOADS if w.most_cpu_us is not None}
    assert bound == {"randwrite 4k depth 32": 80, "randread 4k depth 32": 25}


def test_tables_have_a_line_a_workload_also_where_nothing_was_measured() -> None:
    found = rows(WORKLOADS, SYSTEMS, {(WRITE_1.name, "hci"): {1: measurement(5)}})
    for table in tables(WORKLOADS, SYSTEMS, found):
        assert [len(line) for line in table.lines] == [len(table.header)] * len(WORKLOADS)


def test_markdown_says_what_was_met() -> None:
    taken = {
        (WRITE_1.name, "hci"): {1: measurement(46)},
        (WRITE_1.name, "nbdkit"): {1: measurement(100)},
    }
    found = rows([WRITE_1], SYSTEMS, taken)
    text = markdown("A machine.", [Section("Rows", "About.", tables([WRITE_1], SYSTEMS, found))])
    assert text.startswith("A machine.\n\n### Rows\n\nAbout.\n\n| workload | hci | nbdkit |")
    assert "| randwrite 4k depth 1 | 46 | 100 | - | 0.46 | ≥ 0.45: met | - | ≥ 5 |" in text
