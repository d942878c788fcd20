"""A run beside the last release's ratios."""

from pathlib import Path

import pytest

from bench import reference
from bench.workloads import WORKLOADS
from tests.unit.bench.results import result

FORMER = reference.of_result(result(write=0.5, read=1.0))


def test_row_that_keeps_just_enough_is_not_slower() -> None:
    compared = reference.compare(FORMER, result(write=0.375, read=1.2), 0.75)
    assert not compared.is_slower
    assert [line[-1] for line in compared.table.lines] == ["kept", "kept"]


def test_row_below_the_tolerance_is_slower_and_named() -> None:
    compared = reference.compare(FORMER, result(write=0.37, read=1.0), 0.75)
    assert compared.is_slower
    assert "Slower: write." in compared.about


def test_a_row_is_judged_by_the_median_of_its_rounds() -> None:
    run = result(write=0.1, read=1.0)
    run["rows"][0]["round_ratios_nbdkit"] = [0.1, 0.5, 0.45]
    assert not reference.compare(FORMER, run, 0.75).is_slower


def test_row_that_the_reference_does_not_have_is_not_judged() -> None:
    compared = reference.compare(FORMER, result(new=0.01, read=1.0), 0.75)
    assert not compared.is_slower
    assert compared.table.lines[0][-1] == "new"


def test_run_that_measured_nothing_to_compare_fails() -> None:
    assert reference.compare(FORMER, result(write=None), 0.75).is_slower


def test_result_without_ratios_is_no_reference() -> None:
    with pytest.raises(ValueError, match="no rows"):
        reference.of_result(result(write=None))


def test_reference_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "reference.json"
    file.write_text(reference.text(FORMER))
    assert reference.load(file) == FORMER


def test_reference_that_is_kept_has_all_rows() -> None:
    kept = reference.load(reference.FILE)
    assert set(kept.ratios) == {workload.name for workload in WORKLOADS}
    assert all(ratio > 0 for ratio in kept.ratios.values())
    assert kept.commit
