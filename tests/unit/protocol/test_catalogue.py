"""The catalogue's own rules: what every declaration keeps, so that nobody has to remember."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from msgspec import inspect

from vfiod.protocol.catalogue import COMMANDS, EVENTS, Empty, command_of, event_of
from vfiod.protocol.catalogue.declare import Arguments, CommandSpec, EventData, EventSpec, Family, command, event

# QEMU's own names keep their underscores (qapi/qdev.json, qapi/control.json, qapi/machine.json).
OLD_NAMES = {"qmp_capabilities", "device_add", "device_del", "system_reset"}
KEBAB = re.compile(r"(x-)?[a-z][a-z0-9]*(-[a-z0-9]+)*")
UPPER = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)*")

every_command = pytest.mark.parametrize("spec", COMMANDS.values(), ids=COMMANDS)
every_event = pytest.mark.parametrize("spec", EVENTS.values(), ids=EVENTS)


def structs(info: Any, seen: set[type]) -> Iterator[type[msgspec.Struct]]:
    """A struct and every struct within it."""
    for inner in ("type", "item_type", "value_type"):
        if hasattr(info, inner):
            yield from structs(getattr(info, inner), seen)
    for choice in getattr(info, "types", ()):
        yield from structs(choice, seen)
    if isinstance(info, inspect.StructType) and info.cls not in seen:
        seen.add(info.cls)
        yield info.cls
        for field in info.fields:
            yield from structs(field.type, seen)


@every_command
def test_command_names(spec: CommandSpec) -> None:
    assert spec.name in OLD_NAMES or KEBAB.fullmatch(spec.name)


@every_event
def test_event_names(spec: EventSpec) -> None:
    assert UPPER.fullmatch(spec.name)


@every_command
def test_commands_explain_themselves(spec: CommandSpec) -> None:
    assert spec.summary.endswith((".", ":")), spec.summary
    assert spec.arguments.__doc__


@every_event
def test_events_explain_themselves(spec: EventSpec) -> None:
    assert spec.summary.endswith("."), spec.summary
    assert set(spec.rate_key or ()) <= set(spec.data.__struct_fields__)


@every_command
def test_members_are_kebab_on_the_wire(spec: CommandSpec) -> None:
    seen: set[type] = set()
    for declared in (
        *structs(inspect.type_info(spec.arguments), seen),
        *structs(inspect.type_info(spec.returns), seen),
    ):
        for name in declared.__struct_encode_fields__:
            assert KEBAB.fullmatch(name) or name == "UUID", (declared, name)


@every_command
def test_strange_arguments_are_refused_at_every_level(spec: CommandSpec) -> None:
    for declared in structs(inspect.type_info(spec.arguments), set()):
        assert declared.__struct_config__.forbid_unknown_fields, declared


@every_command
def test_what_may_be_out_of_band_never_waits(spec: CommandSpec) -> None:
    assert not (spec.allow_oob and spec.slow)


@every_command
def test_queries_read_and_may_be_out_of_band(spec: CommandSpec) -> None:
    if spec.name.startswith("query-"):
        assert spec.allow_oob and not spec.mutates and not spec.slow


@every_command
def test_an_instance_finds_its_declaration(spec: CommandSpec) -> None:
    assert command_of(spec.arguments) is spec


@every_event
def test_event_data_find_their_declaration(spec: EventSpec) -> None:
    assert event_of(spec.data) is spec


def test_each_family_is_used() -> None:
    assert {spec.family for spec in COMMANDS.values()} == set(Family)


def test_declarations_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="declared twice"):

        @command("quit", Family.MONITOR)
        class Again(Arguments[Empty]):
            """Twice."""

    with pytest.raises(ValueError, match="says nothing"):

        @command("x-silent", Family.MONITOR)
        class Silent(Arguments[Empty]):
            pass

    with pytest.raises(ValueError, match="no member device"):

        @command("x-lost", Family.MONITOR, device="device")
        class Lost(Arguments[Empty]):
            """Without."""

    with pytest.raises(ValueError, match="declared twice"):

        @event("SHUTDOWN", Family.MONITOR)
        class ShutdownAgain(EventData):
            """Twice."""

    with pytest.raises(ValueError, match="says nothing"):

        @event("SILENT", Family.MONITOR)
        class SilentEvent(EventData):
            pass

    assert not {"x-silent", "x-lost"} & set(COMMANDS) and "SILENT" not in EVENTS
