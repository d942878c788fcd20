"""Becomes another program that finds a listening socket the way systemd hands it over.

`python -m hci.dev.activate FD NAME COMMAND…` puts FD where sd_listen_fds(3) says the first socket
is, and says in LISTEN_PID for whom it is. Only the process itself knows its pid before it runs the
program, hence this step in between.
"""

import os
import sys

FIRST_FD = 3
"""SD_LISTEN_FDS_START."""


def main() -> None:
    """Replace this process."""
    descriptor, name, command = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    if descriptor == FIRST_FD:
        os.set_inheritable(descriptor, True)
    else:
        os.dup2(descriptor, FIRST_FD, inheritable=True)
        os.close(descriptor)
    os.environ |= {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid()), "LISTEN_FDNAMES": name}
    os.execvp(command[0], command)  # noqa: S606 - becoming another program is what this is for


if __name__ == "__main__":
    main()
