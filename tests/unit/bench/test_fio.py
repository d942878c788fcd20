"""What is made of fio's answer."""

import json
from typing import Any

import pytest

from bench.fio import MeasurementError, account, jobs_of


def side(ios: int = 0, iops: float = 0, median_ns: int = 0, p99_ns: int = 0) -> dict[str, Any]:
    latency = {"percentile": {"50.000000": median_ns, "99.000000": p99_ns}} if ios else {}
    return {"total_ios": ios, "iops": iops, "bw_bytes": iops * 4096, "clat_ns": latency}


def job(**sides: Any) -> dict[str, Any]:
    idle = {"read": side(), "write": side(), "sync": {"lat_ns": {}}, "error": 0}
    return {**idle, **sides}


def test_account_of_several_jobs_is_their_sum() -> None:
    one = job(write=side(100, 50, 1000, 2000))
    found = account([one, one], spent_s=0.004)
    assert found.iops == 100
    assert found.cpu_us_per_op == pytest.approx(20)


def test_account_has_the_median_of_what_is_worst_at_the_99th_percentile() -> None:
    """Not the largest median: a spread is of one kind of request."""
    found = account([job(read=side(9, 9, 5000, 6000), write=side(9, 9, 1000, 9000))], spent_s=0)
    assert (found.median_us, found.p99_us) == (1, 9)


def test_account_of_no_request_is_refused() -> None:
    with pytest.raises(MeasurementError, match="single request"):
        account([job()], spent_s=0)


def test_jobs_are_found_between_the_notes_of_engines() -> None:
    text = "note: something\n" + json.dumps({"jobs": [job()]}) + "\nnote: the end"
    assert jobs_of(text) == [job()]


@pytest.mark.parametrize("text", ["", "fio: no such engine", json.dumps({"jobs": [job(error=5)]})])
def test_jobs_that_failed_are_refused(text: str) -> None:
    with pytest.raises(MeasurementError, match="fio: "):
        jobs_of(text)
