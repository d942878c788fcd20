"""The place where hosts of these tests live: namespaces of its own for network, mounts, processes.

    unshare --net --mount --pid --fork --kill-child python -m tests.deploy.switch FOLDER

Prints its process id as seen from outside, then lives until its input ends. All that runs in the
namespaces ends with it, whatever happened to who started it: machines, bridge and mounts are gone
then. FOLDER is named only so that a reaper finds this process.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

NETWORK = "10.88.0"
OUTSIDE = f"{NETWORK}.254"
BRIDGE = "hosts"


def main() -> None:
    """Makes the bridge and waits."""
    # The former /proc is still there, with its numbers.
    print(Path("/proc/self").readlink(), flush=True)
    for command in (
        "mount --make-rprivate /",
        "mount -t proc proc /proc",
        "ip link set lo up",
        f"ip link add {BRIDGE} type bridge",
        f"ip address add {OUTSIDE}/24 dev {BRIDGE}",
        f"ip link set {BRIDGE} up",
    ):
        subprocess.run(command.split(), check=True)
    print("ready", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
