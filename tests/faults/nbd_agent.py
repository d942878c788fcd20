"""An NBD client over libnbd that is told what to do, request by request.

    /usr/bin/python3 -m tests.faults.nbd_agent URI SEED

Runs under the system's Python, which is what Debian builds libnbd for. Reads JSON lines
`{"id", "op", "block", "count", "version"}` from its input and answers `{"id", "error", "versions"}`
as each is completed, in whatever order that is. Ops: write (stamped blocks), zero, trim, read,
flush. The first line it prints is `{"size_bytes"}` or `{"refused"}`. End of input closes the
session in good order.
"""

import json
import os
import select
import sys
from typing import Any

import nbd

from tests.faults.stamps import BLOCK_BYTES, stamp, version_of


class Agent:
    """One NBD session and the requests in flight on it."""

    def __init__(self, uri: str, seed: int) -> None:
        self.seed = seed
        self.handle = nbd.NBD()
        self.handle.connect_uri(uri)
        self.unread = b""

    def serve(self) -> None:
        """Carries requests until the input ends or the server goes away."""
        answer(size_bytes=self.handle.get_size())
        is_open = True
        while is_open or self.handle.aio_in_flight():
            if self.handle.aio_is_dead() or self.handle.aio_is_closed():
                return
            is_open = self.turn(is_open)
        self.handle.shutdown()

    def turn(self, is_open: bool) -> bool:
        """Waits for something to do and does it; says whether the input is still open."""
        direction = self.handle.aio_get_direction()
        events = select.POLLIN if direction & nbd.AIO_DIRECTION_READ else 0
        events |= select.POLLOUT if direction & nbd.AIO_DIRECTION_WRITE else 0
        poll = select.poll()
        poll.register(self.handle.aio_get_fd(), events)
        if is_open:
            poll.register(0, select.POLLIN)
        for descriptor, happened in poll.poll():
            if descriptor == 0:
                is_open = self.take_requests()
            elif happened & select.POLLOUT and direction & nbd.AIO_DIRECTION_WRITE:
                self.handle.aio_notify_write()
            else:
                self.handle.aio_notify_read()
        return is_open

    def take_requests(self) -> bool:
        """Submits what has come on the input; False at its end."""
        content = os.read(0, 1 << 16)
        *lines, self.unread = (self.unread + content).split(b"\n")
        for line in lines:
            self.submit(json.loads(line))
        return bool(content)

    def submit(self, request: dict[str, Any]) -> None:
        """Starts one request; its answer is printed on completion."""
        number, op = request["id"], request["op"]
        first, count = request["block"], request["count"]
        offset, length = first * BLOCK_BYTES, count * BLOCK_BYTES

        def done(error: Any) -> int:
            answer(id=number, error=reason(error), versions=[])
            return 1  # libnbd forgets the request

        if op == "read":
            self.submit_read(number, first, count)
        elif op == "write":
            blocks = [stamp(self.seed, first + n, request["version"]) for n in range(count)]
            content = nbd.Buffer.from_bytearray(bytearray(b"".join(blocks)))
            self.handle.aio_pwrite(content, offset, done)
        elif op == "zero":
            self.handle.aio_zero(length, offset, done)
        elif op == "trim":
            self.handle.aio_trim(length, offset, done)
        else:
            self.handle.aio_flush(done)

    def submit_read(self, number: int, first: int, count: int) -> None:
        """Starts a read; it is answered with the version of each of its blocks."""
        buffer = nbd.Buffer(count * BLOCK_BYTES)

        def done(error: Any) -> int:
            wrong = reason(error)
            content = b"" if wrong else bytes(buffer.to_bytearray())
            blocks = [content[at : at + BLOCK_BYTES] for at in range(0, len(content), BLOCK_BYTES)]
            versions = [version_of(self.seed, first + n, block) for n, block in enumerate(blocks)]
            answer(id=number, error=wrong, versions=versions)
            return 1

        self.handle.aio_pread(buffer, first * BLOCK_BYTES, done)


def reason(error: Any) -> str | None:
    """What libnbd's completion callback was told: an errno, bare or as a C integer."""
    number = int(getattr(error, "value", error))
    return os.strerror(number) if number else None


def answer(**values: object) -> None:
    """Prints one line."""
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Serves one session; the exit code is 1 where the server refused or went away."""
    try:
        agent = Agent(sys.argv[1], int(sys.argv[2]))
    except nbd.Error as refused:
        answer(refused=str(refused))
        sys.exit(1)
    try:
        agent.serve()
    except nbd.Error as lost:
        sys.exit(f"session lost: {lost}")


if __name__ == "__main__":
    main()
