"""Figures as if they had been measured."""

from __future__ import annotations

from typing import Any

from bench.fio import Measurement


def measurement(
    iops: float, *, median_us: float = 100, p99_us: float = 300, cpu_us: float = 20
) -> Measurement:
    """One run of requests of 4 KiB."""
    return Measurement(
        iops=iops,
        mb_per_s=iops * 4096 / 1e6,
        median_us=median_us,
        p99_us=p99_us,
        cpu_us_per_op=cpu_us,
    )


def result(**ratios: float | None) -> dict[str, Any]:
    """A run's JSON, of rows named by their ratio to nbdkit, in one round."""
    return {
        "taken": "2026-01-02T03:04:05Z",
        "commit": "abc",
        "machine": {"processor": "one", "cores": "2"},
        "rounds": 1,
        "runtime_s": 5,
        "rows": [
            {
                "workload": name,
                "system": "hci",
                "ratio_nbdkit": ratio,
                "ratio_gluster": None,
                "round_ratios_nbdkit": [] if ratio is None else [ratio],
            }
            for name, ratio in ratios.items()
        ],
    }
