"""How a command and an event are declared, once, for everybody.

::

    @command("dma-unmap", Family.MEMORY, slow=True)
    class DmaUnmap(Arguments[DmaUnmapResult]):
        '''Remove guest memory mappings. ...'''

        iova: Annotated[int, Meta(ge=0, description="First address, in bytes.")]

From this one declaration come the server's checks (:mod:`msgspec` decodes straight into the class),
``query-qmp-schema``, the client's typed methods, the monitor's completion and the reference pages.
Members are ``snake_case`` here and ``kebab-case`` on the wire.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar, dataclass_transform, get_args

import msgspec

__all__ = [
    "Arguments",
    "CommandSpec",
    "Empty",
    "EventData",
    "EventSpec",
    "Family",
    "Result",
    "COMMANDS",
    "EVENTS",
    "command",
    "event",
    "command_of",
    "event_of",
]


class Family(enum.StrEnum):
    """The families of ``DESIGN.md`` section 4; one module of the catalogue each."""

    MONITOR = "monitor"
    FDS = "fds"
    OBJECTS = "objects"
    DEVICES = "devices"
    MEMORY = "memory"
    REGIONS = "regions"
    INTERRUPTS = "interrupts"
    RESET = "reset"
    CCW = "ccw"
    MEDIATED = "mediated"
    EXPORTS = "exports"


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(msgspec.field,))
class _Frozen(msgspec.StructMeta):
    """Makes every declaration keyword-only and frozen, so that none has to say so itself."""

    def __new__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **config: Any) -> Any:
        return super().__new__(cls, name, bases, namespace, **{"kw_only": True, "frozen": True} | config)


class Declared(msgspec.Struct, metaclass=_Frozen, rename="kebab", omit_defaults=True):
    """The root of everything in the catalogue: ``snake_case`` here, ``kebab-case`` on the wire."""


class Result(Declared):
    """A reply's value, or a part of one.

    Members with a default are left out when they have it:
    ``msgspec.UNSET`` is for what may be absent, and no default for what is always there.

    A member whose name ends in ``_fd`` is the index of an fd among those attached to the reply.
    """


class Empty(Result):
    """``{}``: the command was done and there is nothing to tell."""


R = TypeVar("R")


class Arguments(Declared, Generic[R], forbid_unknown_fields=True):
    """A command's arguments; ``R`` is what it returns. Declared with :func:`command`."""


class EventData(Declared):
    """An event's data. The server adds ``seq``, its place among all events of the machine."""


class CommandSpec(msgspec.Struct, frozen=True):
    """What the catalogue knows of one command.

    Attributes:
        name: on the wire.
        family: where it belongs.
        arguments: the class its arguments are decoded into.
        returns: the type of its result.
        allow_oob: may be executed out of band, and then always answers at once.
        slow: may block in the kernel or a peer: runs off the loop, in order per device.
        mutates: changes something (roles, the audit log and ``x-dry-run`` ask).
        device_member: the member of the arguments that names the device whose order it joins.

    """

    name: str
    family: Family
    arguments: type[Arguments[Any]]
    returns: Any
    allow_oob: bool
    slow: bool
    mutates: bool
    device_member: str | None

    @property
    def unstable(self) -> bool:
        """Names that start with ``x-`` may change (QMP's rule)."""
        return self.name.startswith("x-")

    @property
    def summary(self) -> str:
        """The first sentence of its description."""
        return (self.arguments.__doc__ or "").strip().split("\n", 1)[0]


class EventSpec(msgspec.Struct, frozen=True):
    """What the catalogue knows of one event.

    Attributes:
        name: on the wire.
        family: where it belongs.
        data: the class of its data.
        rate_key: members that form the rate limit's key (``()``: one key for all); None: never limited.

    """

    name: str
    family: Family
    data: type[EventData]
    rate_key: tuple[str, ...] | None

    @property
    def summary(self) -> str:
        """The first sentence of its description."""
        return (self.data.__doc__ or "").strip().split("\n", 1)[0]


COMMANDS: Final[dict[str, CommandSpec]] = {}
"""Every command, by name, in the order of declaration. Filled when the catalogue is imported; then constant."""

EVENTS: Final[dict[str, EventSpec]] = {}
"""Every event, by name."""

_BY_ARGUMENTS: Final[dict[type, CommandSpec]] = {}
_BY_DATA: Final[dict[type, EventSpec]] = {}

A = TypeVar("A", bound=type[Arguments[Any]])
D = TypeVar("D", bound=type[EventData])


def command(
    name: str, family: Family, *, oob: bool = False, slow: bool = False, mutates: bool = True, device: str | None = None
) -> Callable[[A], A]:
    """Declare a command. See :class:`CommandSpec` for the members."""

    def declare(arguments: A) -> A:
        if name in COMMANDS:
            raise ValueError(f"Command {name} is declared twice")
        if not arguments.__doc__:
            raise ValueError(f"Command {name} says nothing of itself: give its class a docstring")
        if device is not None and device not in arguments.__struct_fields__:
            raise ValueError(f"Command {name} has no member {device}")
        returns = next(get_args(base)[0] for base in arguments.__orig_bases__ if get_args(base))  # type: ignore[attr-defined]
        spec = CommandSpec(name, family, arguments, returns, oob, slow, mutates, device)
        COMMANDS[name] = _BY_ARGUMENTS[arguments] = spec
        return arguments

    return declare


def event(name: str, family: Family, *, rate_key: tuple[str, ...] | None = None) -> Callable[[D], D]:
    """Declare an event. ``rate_key`` makes it rate limited, per value of these members, as QEMU does."""

    def declare(data: D) -> D:
        if name in EVENTS:
            raise ValueError(f"Event {name} is declared twice")
        if not data.__doc__:
            raise ValueError(f"Event {name} says nothing of itself: give its class a docstring")
        EVENTS[name] = _BY_DATA[data] = EventSpec(name, family, data, rate_key)
        return data

    return declare


def command_of(arguments: Arguments[Any] | type[Arguments[Any]]) -> CommandSpec:
    """The declaration behind a command's arguments."""
    return _BY_ARGUMENTS[arguments if isinstance(arguments, type) else type(arguments)]


def event_of(data: EventData | type[EventData]) -> EventSpec:
    """The declaration behind an event's data."""
    return _BY_DATA[data if isinstance(data, type) else type(data)]
