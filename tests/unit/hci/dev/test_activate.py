"""Becoming a program with sockets where sd_listen_fds(3) has them, wherever they were before."""

import json
import os
import socket
import subprocess
import sys

import pytest

TELL = """
import json, os, socket
names, pid = os.environ["LISTEN_FDNAMES"], os.environ["LISTEN_PID"]
count = int(os.environ["LISTEN_FDS"])
handed = [socket.socket(fileno=3 + number) for number in range(count)]
ports = [each.getsockname()[1] for each in handed]
descriptors = [f"/proc/self/fd/{each}" for each in os.listdir("/proc/self/fd")]
links = [os.readlink(each) for each in descriptors if os.path.lexists(each)]
more = len([each for each in links if each.startswith("socket:")]) - count
print(json.dumps([names, pid == str(os.getpid()), ports, more]))
"""
# Puts the sockets at these descriptors, then becomes what comes behind.
PLACE = """
import fcntl, os, sys
given, wanted = (list(map(int, each.split(","))) for each in sys.argv[1:3])
# Free ones, whatever numbers the sockets have in the process of the test.
high = [fcntl.fcntl(each, fcntl.F_DUPFD, 50) for each in given]
for each in given:
    os.close(each)
for each, place in zip(high, wanted):
    os.dup2(each, place)
    os.close(each)
os.execv(sys.executable, [sys.executable, "-m", "hci.dev.activate", *sys.argv[2:]])
"""


@pytest.mark.parametrize("places", [[3], [9], [3, 4], [4, 3], [5, 3], [20, 21], [4, 5]])
def test_sockets_are_in_order_and_nothing_else_is_handed_on(places: list[int]) -> None:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in places]
    descriptors = [each.fileno() for each in listeners]
    words = [",".join(map(str, descriptors)), ",".join(map(str, places)), "nbd"]
    done = subprocess.run(
        [sys.executable, "-c", PLACE, *words, sys.executable, "-c", TELL],
        pass_fds=descriptors,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    ports = [each.getsockname()[1] for each in listeners]
    for each in listeners:
        each.close()
    assert json.loads(done.stdout) == [":".join(["nbd"] * len(places)), True, ports, 0]
