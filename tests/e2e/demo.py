"""The demo: a Linux guest on a replicated image, a node killed under it, nothing lost.

Starts a cluster of its own, shows each step as it happens, and leaves nothing running or lying
about, also after Ctrl-C or a failure. Exit code 0 means that every promise shown was kept.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.markup import escape

from tests.devcluster import POOL, CommandError, DevCluster
from tests.e2e.guest.disk import build_guest
from tests.e2e.guest.driver import Guest
from tests.e2e.guest.evidence import DamageError, check_file_system, check_files
from tests.e2e.guest.kernel import GuestBuildError
from tests.e2e.guest.machine import Machine, MachineError

IMAGE = f"{POOL}/guest"
VICTIM = "node2"
BATCH = 10
MAX_FILES = 200  # a bound; it ends two batches after the node is dead
FILE_KIB = 1024
RECORDS = 80
# Someone's own disk may take long to boot under TCG; what is watched is that it keeps doing I/O.
OWN_IMAGE_PATIENCE_S = 75.0
OWN_IMAGE_MIN_REQUESTS = 200
OWN_IMAGE_WATCH_S = 10.0

console = Console(highlight=False)


def main() -> int:
    """Runs the demo; returns the exit code."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--image", type=Path, help="your own bootable disk, instead of our guest")
    parser.add_argument("--accel", default="tcg", help="QEMU's accelerator (tcg, kvm)")
    parser.add_argument(
        "--patience",
        type=float,
        default=OWN_IMAGE_PATIENCE_S,
        help="seconds in which your own disk's system is to ask for something, before and after "
        "the kill",
    )
    arguments = parser.parse_args()
    if arguments.image is not None and not arguments.image.is_file():
        parser.error(f"there is no file {arguments.image}")
    signal.signal(signal.SIGTERM, _end_on_sigterm)
    started = time.monotonic()
    try:
        with contextlib.ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hci-demo-")))
            if arguments.image is not None:
                _show_own_image(
                    stack, scratch, arguments.image, arguments.accel, arguments.patience
                )
                shown = "The machine went on without an I/O error."
            else:
                _show_our_guest(stack, scratch)
                shown = "Nothing was lost."
    except KeyboardInterrupt:
        console.print("\n[yellow]Interrupted: everything was stopped and removed.[/]")
        return 130
    except (CommandError, DamageError, GuestBuildError, MachineError, TimeoutError) as failure:
        console.print(f"\n[bold red]Failed:[/] {escape(str(failure))}")
        return 1
    console.print(f"\n[bold green]{shown}[/] {time.monotonic() - started:.0f} s in all.")
    return 0


def _show_our_guest(stack: contextlib.ExitStack, scratch: Path) -> None:
    with step("Building a guest: Debian's cloud kernel and a small ext4 root"):
        system = build_guest(scratch / "guest")
    cluster = _cluster(stack)
    with step(f"Importing its disk as {IMAGE}"):
        cluster.hci("image", "import", str(system.disk), IMAGE)
    uri = cluster.url("guest")
    guest = Guest(system, uri, scratch)
    with step(f"Booting it in QEMU from {uri}"):
        stack.enter_context(guest)
    with step(f"The guest writes files, syncing each; meanwhile: hci dev kill {VICTIM}"):
        when, longest_s = _write_and_kill(cluster, guest)
    note(f"{VICTIM} died before file {when} was synced; the guest went on to {len(guest.files)}")
    note(f"longest wait for a file of {FILE_KIB} KiB to be written and synced: {longest_s:.1f} s")
    with step(f"The guest commits {RECORDS} records, an fsync each, on what is left"):
        guest.run(f"commit 0 {RECORDS}")
    show(cluster, "status")
    show(cluster, "image", "info", IMAGE)
    with step("The guest reads all its files back from the disk, and shuts down"):
        guest.verify()
        guest.power_off()
    _no_io_errors(guest)
    raw = scratch / "exported.raw"
    with step("Exporting the image"):
        cluster.hci("image", "export", IMAGE, str(raw))
    with step("e2fsck -fn on the exported disk"):
        verdict = check_file_system(raw)
    note(verdict)
    with step("Comparing every checksum that the guest acknowledged"):
        count = check_files(raw, guest.files, guest.records)
    note(f"{count} files and records hold")
    _stop(cluster)


def _show_own_image(
    stack: contextlib.ExitStack, scratch: Path, image: Path, accel: str, patience_s: float
) -> None:
    cluster = _cluster(stack)
    with step(f"Importing {image} as {IMAGE}"):
        cluster.hci("image", "import", str(image), IMAGE, timeout_s=3600)
    uri = cluster.url("guest")
    machine = Machine(uri, scratch, memory="1G", accel=accel)
    with step(f"Booting it in QEMU from {uri}"):
        stack.enter_context(machine)
        _await_requests(machine, OWN_IMAGE_MIN_REQUESTS, patience_s)
    with step(f"Killing {VICTIM} under it"):
        cluster.kill(VICTIM)
        before = _requests(machine)
    with step("Watching it go on"):
        time.sleep(OWN_IMAGE_WATCH_S)
        _await_requests(machine, before + OWN_IMAGE_MIN_REQUESTS, patience_s)
    if _requests(machine) == before:
        raise MachineError(
            f"nothing was shown: it asked nothing of its disk after {VICTIM} was killed; "
            "give a disk whose system boots and goes on reading and writing"
        )
    counters = machine.transferred()
    note(f"read {counters['rd_bytes']:,} bytes, wrote {counters['wr_bytes']:,}")
    show(cluster, "status")
    show(cluster, "image", "info", IMAGE)
    _no_io_errors(machine)
    if counters["failed_rd_operations"] or counters["failed_wr_operations"]:
        raise MachineError("QEMU counted failed operations on the disk")
    if tail := machine.console_tail(4):
        note(f"its serial console says: {tail}")
    with step("Switching it off"):
        machine.close()
    _stop(cluster)


def _cluster(stack: contextlib.ExitStack) -> DevCluster:
    cluster = DevCluster()
    # Entered before it is started: an interrupted start is cleaned up too.
    stack.callback(cluster.close)
    with step(f"Starting etcd, three storage nodes and a gateway in {cluster.directory}"):
        cluster.start()
    return cluster


def _stop(cluster: DevCluster) -> None:
    with step("Stopping and removing the cluster"):
        cluster.close()
    left = cluster.processes()
    if left or cluster.directory.exists():
        shutil.rmtree(cluster.directory, ignore_errors=True)
        raise TimeoutError(f"the cluster left something behind: processes {left}")


def _write_and_kill(cluster: DevCluster, guest: Guest) -> tuple[int, float]:
    """Has the guest write until the node is dead and then some more.

    Returns how many files were synced when it died and the longest wait for one file.
    """
    killer = threading.Thread(target=cluster.kill, args=(VICTIM,))
    synced_when_dead = 0
    longest_s = 0.0
    last = time.monotonic()
    for first in range(0, MAX_FILES, BATCH):
        for _ in guest.follow(f"write {first} {BATCH} {FILE_KIB}"):
            now = time.monotonic()
            longest_s, last = max(longest_s, now - last), now
            if len(guest.files) == BATCH:
                killer.start()
        if not killer.is_alive():
            synced_when_dead = synced_when_dead or len(guest.files)
            if len(guest.files) >= synced_when_dead + 2 * BATCH:
                break
    killer.join()
    if cluster.members()[VICTIM]["state"] == "running":
        raise MachineError(f"{VICTIM} was to be killed and still runs")
    return synced_when_dead, longest_s


def _requests(machine: Machine) -> int:
    counters = machine.transferred()
    return counters["rd_operations"] + counters["wr_operations"]


def _await_requests(machine: Machine, wanted: int, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while _requests(machine) < wanted:
        if machine.process.poll() is not None:
            raise MachineError(f"QEMU ended\n{machine.console_tail()}")
        if time.monotonic() > deadline:
            # An idle guest is no failure, as long as it asks for something after the kill.
            note("the guest asks for little; going on")
            return
        time.sleep(0.25)


def _no_io_errors(machine: Machine) -> None:
    errors = machine.io_errors()
    if errors:
        raise MachineError(f"QEMU reported {len(errors)} I/O errors, the first: {errors[0]}")
    note("QEMU reported no I/O error")


@contextlib.contextmanager
def step(title: str) -> Iterator[None]:
    """Prints what is being done and how long it took."""
    console.print(f"[bold cyan]•[/] {escape(title)}", end="", soft_wrap=True)
    began = time.monotonic()
    try:
        yield
    except BaseException:
        console.print()
        raise
    console.print(f" [dim]({time.monotonic() - began:.1f} s)[/]")


def note(text: str) -> None:
    """Prints a finding under the step that gave it."""
    console.print(f"    [green]{escape(text)}[/]", soft_wrap=True)


def show(cluster: DevCluster, *arguments: str) -> None:
    """Prints a command as a person would type it, and its answer."""
    console.print(f"[bold]$ hci {' '.join(arguments)}[/]")
    done = cluster.try_hci(*arguments)
    for line in (done.stdout + done.stderr).rstrip().splitlines():
        console.print(f"    {escape(line)}", soft_wrap=True)


def _end_on_sigterm(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
