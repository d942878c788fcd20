"""Becomes another program that finds listening sockets the way systemd hands them over.

`python -m hci.dev.activate FD[,FD…] NAME COMMAND…` puts them where sd_listen_fds(3) says, and says
in LISTEN_PID for whom they are. Only the process itself knows its pid before it runs the program,
hence this step in between.
"""

import fcntl
import os
import sys

FIRST_FD = 3
"""SD_LISTEN_FDS_START."""


def main() -> None:
    """Replace this process."""
    given = [int(each) for each in sys.argv[1].split(",")]
    name, command = sys.argv[2], sys.argv[3:]
    # Out of the way first: one may be where another one belongs.
    above = FIRST_FD + len(given)
    held = [fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, above) for each in given]
    for each in given:
        os.set_inheritable(each, False)
    for place, descriptor in enumerate(held, FIRST_FD):
        os.dup2(descriptor, place, inheritable=True)
    os.environ |= {
        "LISTEN_FDS": str(len(given)),
        "LISTEN_PID": str(os.getpid()),
        "LISTEN_FDNAMES": ":".join([name] * len(given)),
    }
    os.execvp(command[0], command)  # noqa: S606 - becoming another program is what this is for


if __name__ == "__main__":
    main()
