"""The exact JSON of the records, what is kept of newer versions, and what is refused."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etcd.errors import MalformedRecord, RecordError, UnknownVersion
from etcd.images import Grant, Parent
from etcd.records import (
    AliveRecord,
    ArbiterRecord,
    CloneRecord,
    ClusterRecord,
    LeaseRecord,
    NameRecord,
    NodeRecord,
    PlacementRecord,
    PoolRecord,
    Record,
    TombstoneRecord,
)
from shard.ids import ImageId
from shard.membership import Policy, WhenFull
from shard.placement import FailureDomain
from tests.unit.samples import ABC, HOLDER, ID, IMAGE

GOLDEN: list[tuple[Record, str]] = [
    (ClusterRecord(id="0" * 32), '{"format":1,"id":"00000000000000000000000000000000","v":1}'),
    (
        NodeRecord(
            name="node1",
            address="10.0.0.1:7101",
            control="10.0.0.1:7201",
            socket=None,
            host="höst",
            zone="default",
            labels={"disk": "nvme"},
            capacity_bytes=1 << 40,
            store_id="1" * 32,
            start_counter=4,
        ),
        '{"address":"10.0.0.1:7101","capacity_bytes":1099511627776,"control":"10.0.0.1:7201",'
        '"host":"höst","labels":{"disk":"nvme"},"name":"node1","socket":null,"start_counter":4,'
        '"store_id":"11111111111111111111111111111111","v":1,"zone":"default"}',
    ),
    (AliveRecord(start_counter=4), '{"start_counter":4,"v":1}'),
    (
        PoolRecord(
            name="vms",
            policy=Policy.THIN_ARBITER,
            shard_bytes=4 << 20,
            replica_sets=2,
            failure_domain=FailureDomain.ZONE,
            arbiter="x",
        ),
        '{"arbiter":"x","failure_domain":"zone","name":"vms","policy":"thin-arbiter",'
        '"replica_sets":2,"shard_bytes":4194304,"v":1}',
    ),
    (
        PoolRecord(
            name="vms",
            policy=Policy.THIN_ARBITER,
            shard_bytes=4 << 20,
            replica_sets=2,
            failure_domain=FailureDomain.ZONE,
            arbiter="x",
            filled=False,
        ),
        '{"arbiter":"x","arbiter_filled":false,"failure_domain":"zone","name":"vms",'
        '"policy":"thin-arbiter","replica_sets":2,"shard_bytes":4194304,"v":1}',
    ),
    (
        PoolRecord(
            name="vms",
            policy=Policy.REPLICA_3,
            shard_bytes=4 << 20,
            replica_sets=1,
            failure_domain=FailureDomain.HOST,
            when_full=WhenFull.ENOSPC,
        ),
        '{"arbiter":null,"failure_domain":"host","name":"vms","policy":"replica-3",'
        '"replica_sets":1,"shard_bytes":4194304,"v":1,"when_full":"enospc"}',
    ),
    (
        ArbiterRecord(
            name="witness", id="2" * 32, address="10.0.0.3:7401", host="far", start_counter=2
        ),
        '{"address":"10.0.0.3:7401","host":"far","id":"22222222222222222222222222222222",'
        '"name":"witness","retired":false,"start_counter":2,"v":1}',
    ),
    (
        PlacementRecord(pool="vms", version=2, sets=(ABC, ("d", "e", "f"))),
        '{"pool":"vms","sets":[["a","b","c"],["d","e","f"]],"v":1,"version":2}',
    ),
    (NameRecord(image=ID), '{"image":"0123456789abcdef0123456789abcdef","v":1}'),
    (
        LeaseRecord(gateway="gateway1", holder=HOLDER, epoch=3),
        '{"epoch":3,"gateway":"gateway1","holder":"ffffffffffffffffffffffffffffffff","v":1}',
    ),
    (
        TombstoneRecord(id=ID, generation=7),
        '{"generation":7,"id":"0123456789abcdef0123456789abcdef","v":1}',
    ),
    (
        IMAGE,
        '{"clean":false,"epoch":3,"generation":7,"holder":"ffffffffffffffffffffffffffffffff",'
        '"id":"0123456789abcdef0123456789abcdef","layers":[{"id":2},{"id":1}],"next_layer":3,'
        '"placement_key":"0123456789abcdef0123456789abcdef","placement_version":1,'
        '"policy":"replica-3","pool":"vms","sets":[["a","b","c"]],"shard_bytes":4194304,'
        '"size_bytes":10737418240,"snapshots":[{"created_s":1700000000,"generation":5,"layer":1,'
        '"name":"before upgrade","size_bytes":8589934592}],'
        '"stale":{"0":{"b":6}},"v":1}',
    ),
    (
        replace(IMAGE, grant=Grant(arbiter="2" * 32, changes=3)),
        '{"clean":false,"epoch":3,"generation":7,'
        '"grant":{"arbiter":"22222222222222222222222222222222","changes":3},'
        '"holder":"ffffffffffffffffffffffffffffffff",'
        '"id":"0123456789abcdef0123456789abcdef","layers":[{"id":2},{"id":1}],"next_layer":3,'
        '"placement_key":"0123456789abcdef0123456789abcdef","placement_version":1,'
        '"policy":"replica-3","pool":"vms","sets":[["a","b","c"]],"shard_bytes":4194304,'
        '"size_bytes":10737418240,"snapshots":[{"created_s":1700000000,"generation":5,"layer":1,'
        '"name":"before upgrade","size_bytes":8589934592}],'
        '"stale":{"0":{"b":6}},"v":1}',
    ),
    (
        replace(
            IMAGE,
            snapshots=(),
            placement_key=ImageId("4" * 32),
            parent=Parent(image=ImageId("3" * 32), layer=9, generation=4, size_bytes=8 << 30),
        ),
        '{"clean":false,"epoch":3,"generation":7,"holder":"ffffffffffffffffffffffffffffffff",'
        '"id":"0123456789abcdef0123456789abcdef","layers":[{"id":2},{"id":1}],"next_layer":3,'
        '"parent":{"generation":4,"image":"33333333333333333333333333333333","layer":9,'
        '"size_bytes":8589934592},'
        '"placement_key":"44444444444444444444444444444444","placement_version":1,'
        '"policy":"replica-3","pool":"vms","sets":[["a","b","c"]],"shard_bytes":4194304,'
        '"size_bytes":10737418240,"snapshots":[],"stale":{"0":{"b":6}},"v":1}',
    ),
    (CloneRecord(), '{"v":1}'),
]


def test_lease_for_maintenance_says_so_and_any_other_does_not() -> None:
    lease = LeaseRecord(gateway="gateway1", holder=HOLDER, epoch=3, maintenance=True)
    assert b'"maintenance":true' in lease.encode()
    assert LeaseRecord.decode("k", lease.encode()) == lease


@pytest.mark.parametrize(("record", "text"), GOLDEN)
def test_record_has_its_golden_json(record: Record, text: str) -> None:
    assert record.encode().decode() == text


@pytest.mark.parametrize("record", [record for record, _ in GOLDEN])
def test_record_decodes_to_what_it_was(record: Record) -> None:
    assert type(record).decode("/hci/x", record.encode()) == record


@pytest.mark.parametrize("record", [record for record, _ in GOLDEN])
def test_fields_of_a_newer_program_are_written_back(record: Record) -> None:
    document = json.loads(record.encode())
    document["added_later"] = {"deep": [1, None, 2.5]}
    decoded = type(record).decode("/hci/x", json.dumps(document).encode())
    assert json.loads(decoded.encode()) == document


@pytest.mark.parametrize("record", [record for record, _ in GOLDEN])
def test_record_of_a_later_version_is_refused(record: Record) -> None:
    document = json.loads(record.encode())
    document["v"] = 2
    with pytest.raises(UnknownVersion, match=r"/hci/x .* version 2, this program knows 1; upgrade"):
        type(record).decode("/hci/x", json.dumps(document).encode())


@pytest.mark.parametrize("record", [record for record, _ in GOLDEN])
def test_record_without_any_one_field_is_refused(record: Record) -> None:
    document = json.loads(record.encode())
    for name in document.keys() - OPTIONAL:
        rest = {key: value for key, value in document.items() if key != name}
        with pytest.raises(MalformedRecord, match=f"{name} is missing"):
            type(record).decode("/hci/x", json.dumps(rest).encode())


OPTIONAL = {"parent", "arbiter_filled", "grant", "next_layer", "when_full"}
"""Fields that stand in a record only where they say something, or that older records lack."""

WRONG: list[Any] = [1.5, [[]], {"0": []}, ""]


@pytest.mark.parametrize("record", [record for record, _ in GOLDEN])
def test_record_with_a_field_of_another_type_is_refused(record: Record) -> None:
    document = json.loads(record.encode())
    for name in document:
        for wrong in WRONG:
            with pytest.raises(MalformedRecord, match=name):
                type(record).decode("/hci/x", json.dumps({**document, name: wrong}).encode())


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b"\xff",
        b'{"v":1,"v":1}',
        b'{"v":true}',
        b'{"v":NaN}',
        b"[" * 100_000,
        b'{"v":' + b"9" * 5000 + b"}",
        b'{"v":1,"start_counter":1,"x":"\\ud800"}',
    ],
)
def test_value_that_is_no_record_is_refused(value: bytes) -> None:
    with pytest.raises(MalformedRecord, match=r"the record /hci/x in etcd is malformed"):
        AliveRecord.decode("/hci/x", value)


@given(st.binary(max_size=200))
def test_any_bytes_decode_or_are_refused(value: bytes) -> None:
    with pytest.raises(RecordError):
        NodeRecord.decode("/hci/x", value)
