"""A command's arguments and results, between JSON and the catalogue's classes."""

from __future__ import annotations

from typing import Any

from msgspec import UNSET, Raw, UnsetType

from vfiod.protocol.catalogue.declare import Arguments, CommandSpec, EventData

__all__ = ["decode_arguments", "decode_result", "decode_event_data"]


def decode_arguments(spec: CommandSpec, raw: Raw | bytes | UnsetType = UNSET) -> Arguments[Any]:
    """Check and decode a command's arguments. Raises InvalidArgument in QEMU's words."""
    raise NotImplementedError


def decode_result(spec: CommandSpec, raw: Raw | bytes) -> Any:
    """Decode a reply's value into the type the catalogue gives. Raises WireError when the server sent something else."""
    raise NotImplementedError


def decode_event_data(name: str, raw: Raw | bytes | UnsetType) -> EventData | None:
    """Decode an event's data; None for an event the catalogue does not know."""
    raise NotImplementedError
