"""What names the memory of a host that holds what a store's processes have not synced.

It is told to peers with each connection, so that they know whether answered writes may be gone. It
lasts as long as the boot does, or until a sync fails: then `forget_memory` gives it another name.
"""

import secrets
from pathlib import Path

import structlog

from hci import daemon

log = structlog.get_logger()

FORGOTTEN = "forgotten"
"""A file in a node's folder: the boot in which its store failed, and the id of the memory since."""


def memory_id(data_dir: Path) -> str:
    """Return what names the memory that holds what this store's processes have not synced.

    It is the kernel's boot id, unless a former process of the same boot ended by a failed sync: the
    kernel has given up what that was to write. Then it is what that process left behind.
    """
    boot = daemon.boot_id()
    try:
        former, memory = (data_dir / FORGOTTEN).read_text().split()
    except (FileNotFoundError, ValueError):
        return boot
    return memory if former == boot else boot


def forget_memory(data_dir: Path) -> None:
    """Have the next process of this boot have another memory. It need not outlive the boot."""
    try:
        (data_dir / FORGOTTEN).write_text(f"{daemon.boot_id()} {secrets.token_hex(16)}")
    except OSError as error:
        log.error("forgotten_not_written", folder=str(data_dir), why=str(error))
