"""`Served`: whom a gateway may let in again, across its own ends and other gateways' holding."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from etcd.images import ImageRecord
from shard.errors import HciError
from shard.ids import ImageId
from tests.unit.samples import image_record
from vmstore.errors import ClientBarred
from vmstore.names import ImageName, parse_image_name
from vmstore.served import Fenced, Served, ServedFile, process_lives

IMAGE = ImageId("cd" * 16)
NAME: ImageName = parse_image_name("vms/a")
GUEST, OTHER = "10:111", "20:222"
FIRST, SECOND, THIRD, ELSEWHERE = "a1" * 16, "a2" * 16, "a3" * 16, "ef" * 16


def record(epoch: int, holder: str | None) -> ImageRecord:
    return image_record(IMAGE, epoch=epoch, holder=holder)


class Host:
    """The host of a gateway whose processes follow each other."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "served.json"
        self.boot = "b0" * 16
        self.living = {GUEST, OTHER}

    def gateway(self, holder: str) -> Served:
        return Served(
            holder, file=ServedFile(self.path), boot=self.boot, lives=self.living.__contains__
        )


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def take(served: Served, before: ImageRecord, holder: str) -> ImageRecord:
    now = replace(before, epoch=before.epoch + 1, holder=holder)
    served.taken(before, now)
    return now


def test_client_of_a_lost_image_is_barred_until_its_process_ends(host: Host) -> None:
    # A gateway was stopped past its lease, another one took the image, wrote and closed it. The
    # first one went on, forgot the image, opened it anew for the client that reconnected, and the
    # old guest's unanswered writes went on top of the new one's.
    served = host.gateway(FIRST)
    mine = take(served, record(0, None), FIRST)
    served.admit(NAME, GUEST, mine)
    served.lost(IMAGE)
    theirs = replace(mine, epoch=2, holder=ELSEWHERE)
    with pytest.raises(ClientBarred):
        served.check(NAME, GUEST, theirs)
    served.check(NAME, OTHER, theirs)
    again = take(served, theirs, FIRST)
    with pytest.raises(ClientBarred):
        served.admit(NAME, GUEST, again)
    served.admit(NAME, OTHER, again)
    assert served.fenced() == Fenced(images=1, barred=1, refused=1)
    host.living.remove(GUEST)
    served.save()
    served.check(NAME, GUEST, again)


def test_image_held_elsewhere_meanwhile_bars_clients_though_nothing_was_heard(host: Host) -> None:
    served = host.gateway(FIRST)
    served.admit(NAME, GUEST, take(served, record(0, None), FIRST))
    theirs = record(2, ELSEWHERE)
    with pytest.raises(ClientBarred):
        served.check(NAME, GUEST, theirs)
    again = take(served, theirs, FIRST)
    with pytest.raises(ClientBarred):
        served.check(NAME, GUEST, again)


def test_restarted_gateway_lets_its_clients_in_where_nobody_else_came(host: Host) -> None:
    served = host.gateway(FIRST)
    held = take(served, record(0, None), FIRST)
    served.admit(NAME, GUEST, held)
    for holder in (SECOND, THIRD):
        served = host.gateway(holder)
        served.check(NAME, GUEST, held)
        held = take(served, held, holder)
        served.admit(NAME, GUEST, held)


def test_restarted_gateway_bars_whom_it_served_before_another_one_came(host: Host) -> None:
    # The gateway was killed, another one took the image and closed it; the new process of the
    # first one knew nothing of the guest that it had served.
    served = host.gateway(FIRST)
    served.admit(NAME, GUEST, take(served, record(0, None), FIRST))
    served = host.gateway(SECOND)
    theirs = record(2, ELSEWHERE)
    with pytest.raises(ClientBarred):
        served.check(NAME, GUEST, theirs)
    held = take(served, theirs, SECOND)
    # Killed again: the one after it knows as well, whoever had it last.
    served = host.gateway(THIRD)
    with pytest.raises(ClientBarred):
        served.check(NAME, GUEST, held)
    served.check(NAME, OTHER, held)


def test_process_killed_between_taking_and_writing_bars_nobody(host: Host) -> None:
    served = host.gateway(FIRST)
    held = take(served, record(0, None), FIRST)
    served.admit(NAME, GUEST, held)
    host.gateway(SECOND)
    unwritten = replace(held, epoch=held.epoch + 1, holder=SECOND)
    served = host.gateway(THIRD)
    served.check(NAME, GUEST, unwritten)
    take(served, unwritten, THIRD)
    served.check(NAME, GUEST, replace(unwritten, epoch=3, holder=THIRD))


def test_process_that_left_by_itself_may_come_again(host: Host) -> None:
    served = host.gateway(FIRST)
    served.admit(NAME, GUEST, take(served, record(0, None), FIRST))
    served.left(IMAGE, GUEST)
    served.check(NAME, GUEST, record(2, ELSEWHERE))


def test_client_is_written_down_before_it_is_let_in(host: Host) -> None:
    served = host.gateway(FIRST)
    held = take(served, record(0, None), FIRST)
    assert not served.is_served(GUEST, held)
    served.admit(NAME, GUEST, held)
    assert served.is_served(GUEST, held)
    assert json.loads(host.path.read_text())["images"][IMAGE]["served"] == [GUEST]
    host.path.unlink()
    host.path.mkdir()
    with pytest.raises(HciError, match="cannot be written"):
        served.admit(NAME, OTHER, held)


def test_processes_that_ended_take_no_room(host: Host) -> None:
    served = host.gateway(FIRST)
    held = take(served, record(0, None), FIRST)
    served.admit(NAME, GUEST, held)
    host.living.clear()
    served.save()
    assert json.loads(host.path.read_text())["images"] == {}


def test_file_of_another_boot_or_a_torn_one_is_nobody(host: Host) -> None:
    served = host.gateway(FIRST)
    served.admit(NAME, GUEST, take(served, record(0, None), FIRST))
    host.boot = "b1" * 16
    host.gateway(SECOND).check(NAME, GUEST, record(9, ELSEWHERE))
    host.path.write_text('{"v": 1, "boot"')
    host.gateway(SECOND).check(NAME, GUEST, record(9, ELSEWHERE))


def test_process_lives_by_id_and_start() -> None:
    after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    assert process_lives(f"{os.getpid()}:{after_name[19]}")
    assert not process_lives(f"{os.getpid()}:{int(after_name[19]) + 1}")
    assert not process_lives("4194399:1")
    assert process_lives("what a newer engine says")


def test_maintenance_elsewhere_bars_nobody_unless_it_was_claimed_for_clients(host: Host) -> None:
    # A gateway was restarted while another one healed the image: nothing of the guest's was
    # overwritten, and it must go on.
    served = host.gateway(FIRST)
    held = take(served, record(0, None), FIRST)
    served.admit(NAME, GUEST, held)
    healed = replace(held, epoch=2, holder=ELSEWHERE, used=held.last_use)
    served = host.gateway(SECOND)
    served.check(NAME, GUEST, healed)
    claimed = replace(healed, used=None)
    with pytest.raises(ClientBarred):
        served.check(NAME, GUEST, claimed)
    mine = replace(healed, epoch=3, holder=SECOND, used=None)
    served.taken(healed, mine)
    served.admit(NAME, GUEST, mine)
    assert host.gateway(THIRD).check(NAME, GUEST, mine) is None


def test_memory_of_answers_outlives_the_gateway_as_long_as_a_guest_does(host: Host) -> None:
    memory = {"node1": "aa", "node2": "bb"}
    served = host.gateway(FIRST)
    mine = replace(take(served, record(0, None), FIRST), clean=False)
    assert served.remember(IMAGE, memory) and not served.remember(IMAGE, memory)
    assert served.memory(IMAGE) == {}, "nobody was answered anything"
    served.admit(NAME, GUEST, mine)
    assert host.gateway(SECOND).memory(IMAGE) == memory
    assert host.gateway(SECOND).remember(IMAGE, {**memory, "node2": "cc"})
    host.living.remove(GUEST)
    assert host.gateway(THIRD).memory(IMAGE) == {}, "who was answered is gone"


def test_memory_of_answers_ends_with_a_clean_end_and_with_the_host(host: Host) -> None:
    served = host.gateway(FIRST)
    mine = take(served, record(0, None), FIRST)
    served.remember(IMAGE, {"node1": "aa"})
    served.admit(NAME, GUEST, mine)
    served.forget_memory(IMAGE)
    assert served.memory(IMAGE), "it was closed under a client that may come back"
    unclean = replace(mine, clean=False)
    again = host.gateway(SECOND)
    again.taken(unclean, replace(unclean, epoch=2, holder=SECOND))
    assert again.memory(IMAGE) == {"node1": "aa"}
    clean = host.gateway(SECOND)
    clean.taken(replace(mine, clean=True), replace(mine, epoch=2, holder=SECOND))
    assert clean.memory(IMAGE) == {}
    served.left(IMAGE, GUEST)
    served.forget_memory(IMAGE)
    assert served.memory(IMAGE) == {}
    host.boot = "b1" * 16
    assert host.gateway(THIRD).memory(IMAGE) == {}
