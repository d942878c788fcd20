"""A daemon's metrics are what Prometheus reads."""

import re
from pathlib import Path
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from hci import metrics
from hci.config import Endpoint
from hci.dev.ports import choose
from hci.errors import DaemonError
from hci.node import node_samples

STATUS = {
    "capacity_bytes": 100,
    "free_bytes": 40,
    "images": 2,
    "connections": 3,
    "flush_number": 4,
    "log_bytes": 5,
    "dirty_shards": 6,
    "no_space": False,
    "counters": {
        "reads": 1,
        "read_bytes": 4096,
        "writes": 2,
        "written_bytes": 8192,
        "zeroes": 3,
        "flushes": 4,
        "copied_bytes": 5,
        "pulled_bytes": 4,
        "served_to_peers_bytes": 3,
        "refused": 6,
        "bad_blocks": 7,
        "syncs": 8,
        "checkpoints": 9,
        "checkpoints_without_space": 10,
    },
}


def _scrape(address: Endpoint) -> dict[tuple[str, tuple[str, ...]], float]:
    with urlopen(f"http://{address}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_scrape_gives_what_the_node_says_at_that_moment() -> None:
    address = Endpoint("127.0.0.1", choose(1, ())[0])
    status = {**STATUS}
    with metrics.served("node x", address, lambda: node_samples(status, None, True)):
        found = _scrape(address)
        assert found["hci_node_up", ()] == 1
        assert found["hci_node_requests_total", ("writes",)] == 2
        assert found["hci_node_bytes_total", ("written",)] == 8192
        assert found["hci_node_bad_blocks_total", ()] == 7
        assert found["hci_node_pulled_bytes_total", ()] == 4
        assert found["hci_node_served_to_peers_bytes_total", ()] == 3
        assert found["hci_node_checkpoints_total", ("no_space",)] == 10
        status["dirty_shards"] = 60
        assert _scrape(address)["hci_node_dirty_shards", ()] == 60
    with pytest.raises(OSError, match="refused"):
        urlopen(f"http://{address}/metrics", timeout=10)


def test_a_failed_store_is_down() -> None:
    samples = {family.name: family.samples for family in node_samples(STATUS, "EIO", False)}
    assert samples["hci_node_up"][0].value == 0
    assert samples["hci_node_registered"][0].value == 0


def test_no_address_serves_nothing_and_a_taken_one_is_a_clear_error() -> None:
    with metrics.served("node x", None, list):
        pass
    address = Endpoint("127.0.0.1", choose(1, ())[0])
    with metrics.served("node x", address, list):
        with pytest.raises(DaemonError, match=r"node y cannot listen for metrics at .*in use"):
            with metrics.served("node y", address, list):
                pass


def test_each_metric_is_documented_and_each_documented_one_exists() -> None:
    project = Path(metrics.__file__).parent.parent
    sources = [project / "hci" / f"{name}.py" for name in ("metrics", "node", "gateway", "arbiter")]
    made = {
        name
        for source in sources
        for name in re.findall(
            r'(?:gauge|counter)\("(hci_[a-z_]+)"', source.read_text(encoding="utf-8")
        )
    }
    text = (project / "docs" / "operations.md").read_text(encoding="utf-8")
    table = text.split("\n## Metrics\n")[1].split("\n## ")[0]
    told = {name for line in table.splitlines() for name in re.findall(r"`(hci_[a-z_]+)", line)}
    assert len(made) > 40
    assert made == told
