"""The name of the memory that a store's processes share."""

from pathlib import Path

from hci import daemon
from hci.memory import FORGOTTEN, forget_memory, memory_id


def test_memory_is_that_of_the_boot_until_a_sync_has_failed_in_it(tmp_path: Path) -> None:
    # The kernel gives up what a failed sync was to write: answered writes went without a power cut.
    boot = daemon.boot_id()
    assert memory_id(tmp_path) == boot
    forget_memory(tmp_path)
    since = memory_id(tmp_path)
    assert since != boot and len(since) == len(boot) and memory_id(tmp_path) == since
    forget_memory(tmp_path)
    assert memory_id(tmp_path) not in (boot, since)
    (tmp_path / FORGOTTEN).write_text(f"{'0' * 32} {since}")
    assert memory_id(tmp_path) == boot, "that was before the host came up"
    (tmp_path / FORGOTTEN).write_text("")
    assert memory_id(tmp_path) == boot
    forget_memory(tmp_path / "gone")
