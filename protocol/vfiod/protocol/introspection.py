"""``query-qmp-schema`` from the catalogue (QEMU ``qapi/introspect.json``)."""

from __future__ import annotations

from typing import Any

from vfiod.protocol.catalogue.declare import CommandSpec

__all__ = ["qmp_schema", "argument_properties"]


def qmp_schema() -> list[dict[str, Any]]:
    """Every command, event and type, as ``query-qmp-schema`` returns it."""
    raise NotImplementedError


def argument_properties(spec: CommandSpec) -> list[dict[str, Any]]:
    """A command's arguments as QEMU's ``ObjectPropertyInfo``: name, type, description, default-value?."""
    raise NotImplementedError
