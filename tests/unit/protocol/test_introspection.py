"""``query-qmp-schema`` is complete, refers to nothing that is missing, and is made of QEMU's words only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from vfiod.protocol.catalogue import COMMANDS, EVENTS
from vfiod.protocol.catalogue.devices import OnRequest, PropertyInfo
from vfiod.protocol.introspection import argument_properties, documented_fields, qmp_schema

SCHEMA = qmp_schema()
BY_NAME = {entity["name"]: entity for entity in SCHEMA}

# qapi/introspect.json: SchemaInfo and its branches.
MEMBERS = {
    "builtin": {"json-type"},
    "enum": {"members", "values"},
    "array": {"element-type"},
    "object": {"members"},
    "alternate": {"members"},
    "command": {"arg-type", "ret-type"},
    "event": {"arg-type"},
}
OPTIONAL = {"command": {"allow-oob", "features"}}
JSON_TYPES = {"string", "number", "int", "boolean", "null", "object", "array", "value"}


def references(entity: dict[str, Any]) -> Iterator[str]:
    for key in ("arg-type", "ret-type", "element-type"):
        if key in entity:
            yield entity[key]
    if entity["meta-type"] != "enum":
        for member in entity.get("members", ()):
            yield member["type"]


def test_names_are_unique() -> None:
    assert len(BY_NAME) == len(SCHEMA)


def test_every_command_and_event_is_there() -> None:
    assert {e["name"] for e in SCHEMA if e["meta-type"] == "command"} == set(COMMANDS)
    assert {e["name"] for e in SCHEMA if e["meta-type"] == "event"} == set(EVENTS)


@pytest.mark.parametrize("entity", SCHEMA, ids=BY_NAME)
def test_an_entity_has_the_members_of_its_kind(entity: dict[str, Any]) -> None:
    kind = entity["meta-type"]
    required = MEMBERS[kind] | {"name", "meta-type"}
    assert required <= set(entity) <= required | OPTIONAL.get(kind, set())
    assert entity.get("json-type", "value") in JSON_TYPES


@pytest.mark.parametrize("entity", SCHEMA, ids=BY_NAME)
def test_every_type_that_is_named_exists(entity: dict[str, Any]) -> None:
    for name in references(entity):
        assert BY_NAME[name]["meta-type"] not in ("command", "event")


def test_no_type_is_there_for_nothing() -> None:
    used = {name for entity in SCHEMA for name in references(entity)}
    assert {e["name"] for e in SCHEMA if e["meta-type"] not in ("command", "event")} == used


def test_arguments_and_data_are_objects() -> None:
    for entity in SCHEMA:
        if "arg-type" in entity:
            assert BY_NAME[entity["arg-type"]]["meta-type"] == "object"


def test_what_is_optional_says_so() -> None:
    members = {member["name"]: member for member in BY_NAME["DeviceAdd"]["members"]}
    assert "default" not in members["driver"]
    assert members["id"]["default"] is None
    assert members["x-no-mmap"]["features"] == ["unstable"]
    assert "features" not in members["id"]


def test_oob_is_marked_where_it_is_allowed_and_only_there() -> None:
    for name, command in COMMANDS.items():
        assert BY_NAME[name].get("allow-oob", False) is command.allow_oob


def test_types_of_every_kind() -> None:
    members = {member["name"]: member["type"] for member in BY_NAME["RegionRead"]["members"]}
    assert members == {"device": "str", "region": "int|str", "offset": "int", "size": "int", "length": "int"}
    assert BY_NAME["int|str"]["members"] == [{"type": "int"}, {"type": "str"}]
    assert BY_NAME["OnRequest"]["values"] == [word.value for word in OnRequest]
    assert BY_NAME[BY_NAME["query-devices"]["ret-type"]]["element-type"] == "DeviceInfo"


def test_events_carry_their_sequence_number() -> None:
    for name in EVENTS:
        members = BY_NAME[BY_NAME[name]["arg-type"]]["members"]
        assert [member for member in members if member["name"] == "seq"] == [{"name": "seq", "type": "int"}]


def test_it_can_be_sent() -> None:
    assert len(msgspec.json.encode(SCHEMA)) < 1_000_000


def test_it_is_the_same_each_time() -> None:
    # The events' sequence numbers are added once, not once per call.
    assert qmp_schema() == SCHEMA


def test_properties_of_a_driver() -> None:
    properties = {prop.name: prop for prop in argument_properties(COMMANDS["device_add"])}
    assert list(properties) == list(COMMANDS["device_add"].arguments.__struct_encode_fields__)
    assert properties["share-fd"] == PropertyInfo(
        name="share-fd",
        type="bool",
        description="Whether region-map may give the device's fd away.",
        default_value=True,
    )
    assert properties["id"].default_value is msgspec.UNSET
    assert msgspec.json.decode(msgspec.json.encode(properties["on-request"]))["default-value"] == "event"


def test_what_is_said_of_a_member_goes_before_what_is_said_of_its_type() -> None:
    described = {field.name: field.description for field in documented_fields(COMMANDS["device_add"].arguments)}
    assert described["container"] == "The id of a vfio-container object."
    assert described["group-fd"].startswith("A file descriptor")
