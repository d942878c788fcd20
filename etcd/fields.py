"""JSON objects taken apart field by field, each checked, and written in one canonical form.

Canonical: UTF-8, keys sorted, no spaces, no duplicate keys, so that equal records are equal bytes
and etcd can compare them.
"""

import json
from collections.abc import Callable, Mapping
from typing import NoReturn, TypeVar

from etcd.errors import MalformedRecord, UnknownVersion
from shard.errors import BadValue
from shard.geometry import check_shard_size
from shard.ids import node_name
from shard.membership import Policy
from shard.placement import ReplicaSet

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]

NUMBER_MAX = (1 << 63) - 1
"""Largest number a record holds; etcd's own numbers are of this size too."""

_T = TypeVar("_T")


def encode(version: int, fields: Mapping[str, Json]) -> bytes:
    """Return the canonical bytes of a record."""
    document = {**fields, "v": version}
    text = json.dumps(
        document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()


class Fields:
    """The fields of one JSON object. Each is taken once; what stays is unknown to this version.

    Raises MalformedRecord with the record's key and the field's path.
    """

    def __init__(self, key: str, value: object, path: str = "") -> None:
        self._key = key
        self._path = path
        if not isinstance(value, dict):
            self._fail("", "is not an object")
        self._left: dict[str, Json] = dict(value)

    @classmethod
    def of_bytes(cls, key: str, value: bytes, version: int) -> "Fields":
        """Return the fields of a record; raises UnknownVersion where `v` is not `version`."""
        try:
            document = json.loads(
                value.decode(), object_pairs_hook=_no_duplicates, parse_constant=_no_constant
            )
            json.dumps(document, ensure_ascii=False).encode()  # Refuses what UTF-8 cannot hold.
        except (ValueError, RecursionError) as error:
            raise MalformedRecord(key, f"it is not JSON ({error})") from None
        fields = cls(key, document)
        found = fields.number("v")
        if found != version:
            raise UnknownVersion(key, found, version)
        return fields

    def rest(self) -> dict[str, Json]:
        """Return the fields not taken: those of a newer version, to be written back unchanged."""
        return self._left

    def has(self, name: str) -> bool:
        """Whether a field stands in the record and was not taken yet."""
        return name in self._left

    def text(self, name: str, check: Callable[[str], _T]) -> _T:
        """Return a string that passes `check`, which raises BadValue."""
        value = self._take(name)
        if not isinstance(value, str):
            self._fail(name, "is not a string")
        try:
            return check(value)
        except BadValue as error:
            self._fail(name, str(error))

    def optional_text(self, name: str, check: Callable[[str], _T]) -> _T | None:
        """Return as `text` does, or None where the field is null."""
        if self._left.get(name, "") is None:
            del self._left[name]
            return None
        return self.text(name, check)

    def number(self, name: str, minimum: int = 0) -> int:
        """Return a whole number from `minimum` to NUMBER_MAX."""
        return self._number(name, self._take(name), minimum)

    def boolean(self, name: str) -> bool:
        """Return true or false."""
        value = self._take(name)
        if not isinstance(value, bool):
            self._fail(name, "is not true or false")
        return value

    def flag(self, name: str) -> bool:
        """Return true or false; a field that is not there is false, and is not written."""
        return self.boolean(name) if name in self._left else False

    def items(self, name: str) -> list[Json]:
        """Return a list."""
        value = self._take(name)
        if not isinstance(value, list):
            self._fail(name, "is not a list")
        return value

    def whole_numbers(self, name: str, minimum: int = 0) -> tuple[int, ...]:
        """Return a list of whole numbers from `minimum` on."""
        return tuple(self._number(name, item, minimum) for item in self.items(name))

    def texts(self, name: str, value: Json, check: Callable[[str], str]) -> tuple[str, ...]:
        """Return the strings of a list that was found within field `name`."""
        if not isinstance(value, list):
            self._fail(name, "is not a list of strings")
        found = []
        for item in value:
            if not isinstance(item, str):
                self._fail(name, "is not a list of strings")
            try:
                found.append(check(item))
            except BadValue as error:
                self._fail(name, str(error))
        return tuple(found)

    def within(self, name: str, value: Json) -> "Fields":
        """Return the fields of an object that was found within field `name`."""
        return Fields(self._key, value, f"{self._path}{name}.")

    def mapping(self, name: str) -> dict[str, Json]:
        """Return an object whose keys are data."""
        value = self._take(name)
        if not isinstance(value, dict):
            self._fail(name, "is not an object")
        return value

    def numbers(self, name: str, value: Json) -> dict[str, int]:
        """Return {text: number} of an object that was found within field `name`."""
        if not isinstance(value, dict):
            self._fail(name, "is not an object")
        return {key: self._number(name, number, 0) for key, number in value.items()}

    def fail(self, name: str, problem: str) -> NoReturn:
        """Raise MalformedRecord for a field that breaks a rule beyond its type."""
        self._fail(name, problem)

    def _number(self, name: str, value: Json, minimum: int) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            self._fail(name, "is not a whole number")
        if not minimum <= value <= NUMBER_MAX:
            self._fail(name, f"is not within {minimum} and 2^63-1")
        return value

    def _take(self, name: str) -> Json:
        if name not in self._left:
            self._fail(name, "is missing")
        return self._left.pop(name)

    def _fail(self, name: str, problem: str) -> NoReturn:
        field = f"{self._path}{name}".rstrip(".")
        raise MalformedRecord(self._key, f"{field} {problem}" if field else f"it {problem}")


def _no_duplicates(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a field stands twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


# Fields that several records have


def not_empty(text: str) -> str:
    """Return a string that is not empty. Raises BadValue."""
    if not text:
        raise BadValue("is empty")
    return text


def policy_of(text: str) -> Policy:
    """Return the policy that a string names. Raises BadValue."""
    try:
        return Policy(text)
    except ValueError:
        raise BadValue(f"{text!r} is a policy this program does not know") from None


def shard_bytes_of(fields: Fields) -> int:
    """Return the size of shards, from `shard_bytes`."""
    try:
        return check_shard_size(fields.number("shard_bytes"))
    except BadValue as error:
        fields.fail("shard_bytes", str(error))


def sets_of(fields: Fields) -> tuple[ReplicaSet, ...]:
    """Return replica sets, from `sets`."""
    sets = tuple(fields.texts("sets", members, node_name) for members in fields.items("sets"))
    if not sets or not all(sets):
        fields.fail("sets", "is empty or has an empty replica set")
    return sets


def sets_json(sets: tuple[ReplicaSet, ...]) -> Json:
    """Return replica sets as `sets_of` reads them."""
    return [list(members) for members in sets]
