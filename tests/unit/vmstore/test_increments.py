"""The format of increments: what was written is read, and anything else is refused."""

from io import BytesIO

import pytest

from vmstore.increments import BadIncrement, Header, Reader, Record, State, Writer

HEADER = Header(
    image="vms/wéb",
    image_id="a1" * 16,
    base=State("mon", 3, 8192),
    target=State("tue", 5, 1 << 42),
    base_digest="0f" * 32,
)
RECORDS = [
    Record(0, 4096, b"a" * 4096),
    Record(4096, 1 << 41, None),
    Record((1 << 42) - 512, 512, b"b" * 512),
]


def written(records: list[Record], *, finished: bool = True) -> bytes:
    file = BytesIO()
    writer = Writer(file, HEADER)
    for record in records:
        writer.add(record)
    if finished:
        writer.finish()
    return file.getvalue()


def read(content: bytes) -> list[Record]:
    reader = Reader(BytesIO(content), "file")
    assert reader.header == HEADER
    return list(reader.records())


def test_increment_is_read_as_it_was_written() -> None:
    assert read(written(RECORDS)) == RECORDS
    assert read(written([])) == []


def test_increment_that_is_cut_short_anywhere_is_refused() -> None:
    whole = written([Record(8, 16, b"c" * 16), RECORDS[1]])
    for length in range(len(whole)):
        with pytest.raises(BadIncrement):
            read(whole[:length])
    with pytest.raises(BadIncrement):
        read(written(RECORDS, finished=False))


def test_increment_with_any_bit_changed_is_refused() -> None:
    whole = written([Record(8, 16, b"c" * 16), RECORDS[1]])
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        with pytest.raises(BadIncrement):
            read(bytes(damaged))
    with pytest.raises(BadIncrement):
        read(whole + b"\0")


def test_increment_of_which_a_whole_record_is_missing_or_another_one_is_refused() -> None:
    one, other = RECORDS[0], Record(0, 4096, b"x" * 4096)
    whole, changed = written([one, RECORDS[2]]), written([other, RECORDS[2]])
    begin = len(written([], finished=False))
    end = begin + 17 + 4096 + 32
    with pytest.raises(BadIncrement):
        read(whole[:begin] + whole[end:])
    with pytest.raises(BadIncrement):
        read(whole[:begin] + changed[begin:end] + whole[end:])


@pytest.mark.parametrize(
    "records",
    [[RECORDS[1], RECORDS[0]], [RECORDS[0], RECORDS[0]], [Record(1 << 42, 1, None)]],
    ids=["in no order", "twice", "past the end"],
)
def test_increment_whose_records_do_not_fit_is_refused(records: list[Record]) -> None:
    with pytest.raises(BadIncrement, match="damaged"):
        read(written(records))


def test_file_that_is_no_increment_or_a_later_one_is_refused_by_name() -> None:
    with pytest.raises(BadIncrement, match="file is no increment"):
        read(b"QFI\xfb" + bytes(100))
    later = bytearray(written(RECORDS))
    later[8] = 2
    with pytest.raises(BadIncrement, match="has version 2"):
        read(bytes(later))
