"""Frames of the bus, both ends: msgpack whose lengths lie, that is deep, or says what JSON has no words for."""

from __future__ import annotations

from tests.fuzz.target import Target, lines

from vfiod.protocol.catalogue import COMMANDS
from vfiod.protocol.errors import CommandError, VfiodError, WireError
from vfiod.protocol.wire import packed
from vfiod.protocol.wire.arguments import convert_arguments

__all__ = ["TARGETS"]


def _calls(data: bytes) -> None:
    call = packed.decode_call(data)
    if isinstance(call, packed.Refused):
        _answered(call.error, call.id)
        return
    spec = COMMANDS.get(call.command)
    if spec is None:
        return
    try:
        convert_arguments(spec, call.arguments)
    except CommandError as error:
        _answered(error, None if not isinstance(call.id, str | int | float) else call.id)


def _answered(error: VfiodError, id: str | int | float | None) -> None:
    answer = packed.decode_answer(packed.encode_error(error, id))
    assert isinstance(answer, packed.Failure)
    assert answer.id == id or id != id, "the answer is for another call"
    assert answer.desc


def _answers(data: bytes) -> None:
    try:
        answer = packed.decode_answer(data)
        if isinstance(answer, packed.Answer):
            for command in ("query-version", "query-irqs", "region-read", "query-machine", "query-qmp-schema"):
                packed.decode_result(command, answer.value)
    except WireError as error:
        assert str(error)
    try:
        notice = packed.decode_notice(data)
    except WireError as error:
        assert str(error)
    else:
        assert isinstance(notice.name, str)
        assert all(isinstance(one, int) for one in (notice.seq, notice.seconds, notice.microseconds))


_MODULES = ("vfiod.protocol.wire.packed", "vfiod.protocol.wire.arguments")

TARGETS = (
    Target(
        "bus-server",
        _calls,
        lambda: lines("bus-server"),
        _MODULES,
        "a frame is a call or is refused; the refusal can be sent, and answers that call",
        1000,
    ),
    Target(
        "bus-client",
        _answers,
        lambda: lines("bus-client"),
        _MODULES,
        "a client that is lied to gets a WireError, and nothing else",
        1000,
    ),
)
