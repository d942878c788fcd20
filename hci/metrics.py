"""Metrics of a daemon in Prometheus' text format, over HTTP.

Nothing is kept here: each scrape asks the daemon how it is. Names follow Prometheus' conventions
(https://prometheus.io/docs/practices/naming/): `hci_`, what it counts, its unit, `_total` for what
only grows. Where an engine restarts, its counters begin anew at 0, as `rate()` expects.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine import VERSION
from hci import daemon
from hci.config import Endpoint
from hci.errors import DaemonError

Samples = Iterable[Metric]
Values = float | Mapping[Any, float]
"""One value, or one for each tuple of label values."""


class _Scrape(Collector):
    def __init__(self, samples: Callable[[], Samples]) -> None:
        self._samples = samples

    def collect(self) -> Samples:
        yield gauge("hci_info", "The daemon's version.", {(VERSION,): 1}, ["version"])
        yield from self._samples()

    def describe(self) -> Samples:
        # Without this, registering would scrape a daemon that is not ready yet.
        return ()


@contextmanager
def served(name: str, address: Endpoint | None, samples: Callable[[], Samples]) -> Iterator[None]:
    """Answer scrapes at `address` with what `samples` returns, in threads of its own.

    Without an address there is nothing to do. Raises DaemonError where it cannot listen.
    """
    if address is None:
        yield
        return
    registry = CollectorRegistry()
    registry.register(_Scrape(samples))
    try:
        host = daemon.numeric(address).rsplit(":", 1)[0].strip("[]")
        server, thread = start_http_server(address.port, host, registry)
    except OSError as error:
        raise DaemonError(
            f"{name} cannot listen for metrics at {address}: {error.strerror or error}; "
            "is the port in use?"
        ) from error
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def gauge(
    name: str,
    about: str,
    values: Values,
    labels: list[str] | None = None,
) -> Metric:
    """Return a gauge: one value, or one for each tuple of label values."""
    family = GaugeMetricFamily(name, about, labels=labels or [])
    for key, value in _items(values):
        family.add_metric(key, value)
    return family


def counter(
    name: str,
    about: str,
    values: Values,
    labels: list[str] | None = None,
) -> Metric:
    """Return a counter; `name` ends in `_total`."""
    family = CounterMetricFamily(name, about, labels=labels or [])
    for key, value in _items(values):
        family.add_metric(key, value)
    return family


def _items(
    values: Values,
) -> Iterable[tuple[tuple[str, ...], float]]:
    return values.items() if isinstance(values, Mapping) else [((), values)]
