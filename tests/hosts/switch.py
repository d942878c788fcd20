"""Network namespaces on one bridge, and lines between them that can be cut or made bad.

    unshare --net python -m tests.hosts.switch FOLDER NAME…

Owns a namespace for each NAME, held by an open file, and its own, in which the bridge is and a
program that belongs to no host runs. FOLDER is named only so that a reaper finds this process. All
is gone when this process and those in the namespaces are: nothing is left to clean up.

What one member sends to another goes to the Ethernet address that its neighbour table gives, and
nothing but that table is changed to make a line fail, in that direction only and also for
connections that are open:

    the other's own address       delivered by the kernel, at its speed
    an address of nobody          dropped in silence
    an alias of the other         delivered here, to a TAP device, and from here after what
                                  `tests.hosts.line` does to it

So this needs no netem, no packet filter and no module of either. Reads one JSON object a line from
its input, `[{"from", "to", "line": null | "cut" | {…}}, …]`, and answers each with a line.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import select
import struct
import subprocess
import sys
import threading
import time
from random import Random
from typing import Any

from tests.hosts.line import Line, Queue

CLONE_NEWNET = 0x40000000
TUNSETIFF = 0x400454CA
IFF_TAP_NO_PI = 0x0002 | 0x1000
MTU = 9000
NETWORK = "10.99.0"
OUTSIDE = "outside"
OUTSIDE_NUMBER = 254
FRAMES_AT_ONCE = 256


class Switch:
    """The namespaces, the bridge and the bad lines."""

    def __init__(self, names: list[str], seed: int) -> None:
        self.numbers = {name: number for number, name in enumerate(names, start=1)}
        self.numbers[OUTSIDE] = OUTSIDE_NUMBER
        self.spaces = {name: new_namespace() for name in names}
        self.spaces[OUTSIDE] = os.open("/proc/self/ns/net", os.O_RDONLY)
        self._lines: dict[tuple[int, int], Line] = {}
        self._queue = Queue(Random(seed))
        self._tap = -1
        self._unread = b""

    def build(self) -> None:
        """Makes bridge and lines, all of them whole."""
        setting = [
            f"link add bridge address {own(OUTSIDE_NUMBER)} type bridge stp_state 0",
            f"address add {NETWORK}.{OUTSIDE_NUMBER}/24 dev bridge",
            "link set lo up",
            f"link set bridge mtu {MTU} up",
        ]
        for name, number in self.numbers.items():
            if name != OUTSIDE:
                setting += [
                    f"link add port{number} mtu {MTU} type veth peer name eth0 "
                    f"mtu {MTU} address {own(number)} netns {self.path(name)}",
                    f"link set port{number} master bridge up",
                ]
        ip(self.path(OUTSIDE), setting)
        self._tap = open_tap("line")
        lines = [f"link set line mtu {MTU}", "link set line master bridge up"]
        ip(self.path(OUTSIDE), lines)
        for number in self.numbers.values():
            run("bridge", "fdb", "add", alias(number), "dev", "line", "master", "static")
        for name, number in self.numbers.items():
            inside = [] if name == OUTSIDE else [
                "link set lo up",
                f"address add {NETWORK}.{number}/24 dev eth0",
                "link set eth0 up",
            ]  # fmt: skip
            inside += [
                self._neighbour(name, other, own(self.numbers[other]))
                for other in self.numbers
                if other != name
            ]
            ip(self.path(name), inside)

    def path(self, name: str) -> str:
        """The namespace as other programs open it."""
        return f"/proc/{os.getpid()}/fd/{self.spaces[name]}"

    def change(self, changes: list[dict[str, Any]]) -> None:
        """Makes lines as told, each in one direction."""
        batches: dict[str, list[str]] = {}
        for change in changes:
            source, target, line = change["from"], change["to"], change["line"]
            number = self.numbers[target]
            way = (self.numbers[source], number)
            if line is None:
                address = own(number)
                self._lines.pop(way, None)
            elif line == "cut":
                address = NOBODY
            else:
                address = alias(number)
                self._lines[way] = Line(**line)
            batches.setdefault(source, []).append(self._neighbour(source, target, address))
        for source, commands in batches.items():
            ip(self.path(source), commands)

    def serve(self) -> None:
        """Does what the input says and carries frames until the input ends."""
        poll = select.poll()
        poll.register(0, select.POLLIN)
        poll.register(self._tap, select.POLLIN)
        while True:
            next_s = self._queue.next_s()
            wait_ms = None if next_s is None else max(0.0, (next_s - time.monotonic()) * 1000)
            for descriptor, _ in poll.poll(wait_ms):
                if descriptor == self._tap:
                    self._receive()
                elif not self._take_orders():
                    return
            self._send()

    def _take_orders(self) -> bool:
        content = os.read(0, 1 << 16)
        *lines, self._unread = (self._unread + content).split(b"\n")
        for line in lines:
            try:
                self.change(json.loads(line))
                answer(error=None)
            except (OSError, subprocess.CalledProcessError) as error:
                answer(error=said(error))
        return bool(content)

    def _receive(self) -> None:
        """Takes frames off the bridge. Those that are not for an alias were flooded to all."""
        for _ in range(FRAMES_AT_ONCE):
            try:
                frame = os.read(self._tap, MTU + 64)
            except BlockingIOError:
                return
            target, source = frame[5], frame[11]
            line = self._lines.get((source, target))
            if line is not None and frame[:5] == ALIAS_PREFIX:
                self._queue.take(time.monotonic(), source, target, line, frame)

    def _send(self) -> None:
        """Puts what is due back on the bridge, as if the sender's alias had sent it."""
        now_s = time.monotonic()
        while (leaving := self._queue.leave(now_s)) is not None:
            frame = leaving.frame
            head = OWN_PREFIX + frame[5:6] + ALIAS_PREFIX + frame[11:12]
            try:
                os.write(self._tap, head + frame[12:])
            except BlockingIOError:
                return  # the device is full: dropped, as a wire would

    def _neighbour(self, source: str, target: str, address: str) -> str:
        device = "bridge" if source == OUTSIDE else "eth0"
        number = self.numbers[target]
        return f"neigh replace {NETWORK}.{number} lladdr {address} nud permanent dev {device}"


OWN_PREFIX = bytes.fromhex("0200000000")
ALIAS_PREFIX = bytes.fromhex("02aa000000")
NOBODY = "02:dd:00:00:00:00"


def own(number: int) -> str:
    """The Ethernet address of a member."""
    return (OWN_PREFIX + bytes([number])).hex(":")


def alias(number: int) -> str:
    """The address under which frames for a member come here first."""
    return (ALIAS_PREFIX + bytes([number])).hex(":")


def new_namespace() -> int:
    """A network namespace that lives as long as what is returned is open, or a process in it."""
    made: list[int | OSError] = []

    def make() -> None:
        # A thread may have a namespace of its own, and this one ends with nothing but that.
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(CLONE_NEWNET) != 0:
            made.append(OSError(ctypes.get_errno(), "no network namespace (unshare)"))
        else:
            made.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    if isinstance(made[0], OSError):
        raise made[0]
    return made[0]


def open_tap(name: str) -> int:
    """A TAP device, without offloads: whole frames of at most the MTU, checksums filled in."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP_NO_PI))
    return descriptor


def ip(namespace: str, commands: list[str]) -> None:
    """Runs `ip` commands in a namespace; raises CalledProcessError at the first that fails."""
    subprocess.run(
        ["nsenter", f"--net={namespace}", "ip", "-batch", "-"],
        input="\n".join(commands) + "\n",
        check=True,
        capture_output=True,
        text=True,
    )


def run(*command: str) -> None:
    """Runs a program of this namespace; raises CalledProcessError."""
    subprocess.run(command, check=True, capture_output=True, text=True)


def said(error: OSError | subprocess.CalledProcessError) -> str:
    """What went wrong, with the words of the program that failed."""
    return f"{error}: {getattr(error, 'stderr', '') or ''}".strip()


def answer(**values: object) -> None:
    """Prints one line."""
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Builds the network, says so, and serves."""
    _folder, seed, *names = sys.argv[1:]
    try:
        switch = Switch(names, int(seed))
        switch.build()
    except (OSError, subprocess.CalledProcessError) as error:
        answer(error=said(error))
        sys.exit(1)
    answer(error=None, spaces={name: switch.path(name) for name in switch.numbers})
    switch.serve()


if __name__ == "__main__":
    main()
