"""From a name and raw arguments to a result through jsonrpcserver: what it calls, and what it never gets to see."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from msgspec import Raw

from vfiod.protocol.catalogue import COMMANDS, Empty
from vfiod.protocol.catalogue.fds import Closefd
from vfiod.protocol.errors import Busy, CommandError, CommandNotFound, DeviceNotFound, InternalError, InvalidArgument
from vfiod.server.commands.call import Call
from vfiod.server.commands.table import TABLE
from vfiod.server.monitor import dispatch, lean

NOBODY = cast("Any", None)


def _call() -> Call:
    return Call(NOBODY, NOBODY)


def _run(handler: Any, arguments: Any = None) -> Any:
    method = dispatch.build_methods({"closefd": handler})["closefd"]
    call = _call()
    value = dispatch.execute(method, call, arguments or Closefd(fdname="a"))
    if isinstance(value, dispatch.Pending):
        value = asyncio.run(dispatch.finish(method, call, value))
    return value


def test_the_table_is_the_catalogue() -> None:
    assert set(TABLE) == set(COMMANDS)
    with pytest.raises(ValueError, match="without a declaration in the catalogue: nope"):
        dispatch.build_methods({"nope": NOBODY})


def test_every_call_goes_through_jsonrpcserver(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    real, real_async = lean.call, lean.async_call

    def spy(request: Any, context: Any, method: Any) -> Any:
        asked.append(request)
        return real(request, context, method)

    async def async_spy(request: Any, context: Any, method: Any) -> Any:
        asked.append(request)
        return await real_async(request, context, method)

    monkeypatch.setattr(dispatch, "_jsonrpc_call", spy)
    monkeypatch.setattr(lean, "async_call", async_spy)

    async def later(_call: Call, _arguments: Any) -> str:
        return "later"

    assert _run(lambda _call, arguments: arguments.fdname) == "a"
    assert _run(later) == "later"
    assert [request.method for request in asked] == ["closefd", "closefd", "closefd"]


def test_arguments_are_checked_before_anything_happens() -> None:
    method = dispatch.build_methods({"closefd": lambda _c, _a: None})["closefd"]
    assert dispatch.prepare(method, Raw(b'{"fdname": "a"}')) == Closefd(fdname="a")
    with pytest.raises(InvalidArgument, match=r"^Parameter 'fdname' is missing$"):
        dispatch.prepare(method, Raw(b"{}"))


def test_unknown_names_in_qemus_words() -> None:
    with pytest.raises(CommandNotFound, match=r"^The command nope has not been found$"):
        dispatch.find({}, "nope")


def test_nothing_returned_is_an_empty_object() -> None:
    assert _run(lambda _c, _a: None) == Empty()


async def _raise_later(error: BaseException) -> Any:
    await asyncio.sleep(0)
    raise error


@pytest.mark.parametrize("error", [DeviceNotFound.named("x"), Busy("busy"), CommandError("no")])
def test_refusals_come_back_as_they_are(error: CommandError, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(_call: Call, _arguments: Any) -> Any:
        raise error

    for handler in (refuse, lambda _c, _a: _raise_later(error)):
        value = _run(handler)
        assert isinstance(value, dispatch.Failure)
        assert value.error is error
    assert caplog.records == []


def test_defects_come_back_without_internals_and_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    def fail(_call: Call, _arguments: Any) -> Any:
        raise KeyError("/secret/path")

    for handler in (fail, lambda _c, _a: _raise_later(KeyError("/secret/path"))):
        caplog.clear()
        value = _run(handler)
        assert isinstance(value.error, InternalError)
        assert "secret" not in str(value.error)
        assert len(caplog.records) == 1
        assert caplog.records[0].exc_info


def test_a_cancelled_command_is_failed_and_stays_cancelled() -> None:
    async def scenario() -> None:
        method = dispatch.build_methods({"closefd": lambda _c, _a: asyncio.sleep(1000)})["closefd"]
        call = _call()
        pending = dispatch.execute(method, call, Closefd(fdname="a"))
        task = asyncio.ensure_future(dispatch.finish(method, call, pending))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scenario())
