"""From a command's name and raw arguments to its result, through jsonrpcserver, for every dialect.

jsonrpcserver's ``call`` calls the handler and shapes what comes back into its ``Result``. The rest of it is not
used: our table finds the handler, and the catalogue's types check the arguments, once (the reference on
performance says what that saves). It would put ``str(exception)`` of whatever a handler raises into the reply, and
so give away paths and internals; so the function it is given raises nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, NamedTuple

from msgspec import UNSET, Raw, UnsetType

from vfiod.protocol.catalogue import COMMANDS, Arguments, CommandSpec, Empty
from vfiod.protocol.errors import CommandError, CommandNotFound, InternalError
from vfiod.protocol.wire.arguments import decode_arguments
from vfiod.server import trace
from vfiod.server.commands.call import Call, Handler
from vfiod.server.monitor import lean
from vfiod.server.monitor.roles import THROUGH_OTHERS, Role

__all__ = [
    "Failure",
    "Method",
    "Methods",
    "Pending",
    "RoleMethods",
    "build_methods",
    "execute",
    "finish",
    "find",
    "prepare",
]

_log: Final = logging.getLogger(__name__)

_EMPTY: Final = Empty()

# Looked up once: these are on every command's way.
_jsonrpc_call: Final = lean.call
_begin: Final = trace.command_begin
_end: Final = trace.command_end


class Method:
    """One command, ready to be called.

    Attributes:
        name: on the wire.
        spec: its declaration.
        allow_oob: may be executed out of band.
        audited: may change something: the audit log has it, when there is one. What runs other commands is not: it
            notes each of them itself.
        device_member: the member of its arguments that names the device whose order it joins.
        no_arguments: what it is called with when no arguments came; None when it requires some.
        invoke: what jsonrpcserver calls: the handler, with its exceptions turned into results.
        request: what jsonrpcserver is asked; always the same, for the arguments travel with the call.

    """

    __slots__ = ("allow_oob", "audited", "device_member", "invoke", "name", "no_arguments", "request", "spec")

    def __init__(self, spec: CommandSpec, handler: Handler) -> None:
        self.name: Final = spec.name
        self.spec: Final = spec
        self.allow_oob: Final = spec.allow_oob
        self.audited: Final = spec.mutates and spec.name not in THROUGH_OTHERS
        self.device_member: Final = spec.device_member
        # Arguments are frozen, so that one object serves every call.
        self.no_arguments: Final = _without(spec)
        self.invoke: Final = _guarded(spec.name, handler)
        self.request: Final = lean.Request(spec.name, [], lean.NOID)


Methods = Mapping[str, Method]


class RoleMethods(dict[str, Method]):
    """The part of the method table that a role may use.

    Attributes:
        role: whose it is.
        everything: the whole table, to tell what is forbidden from what does not exist.

    """

    def __init__(self, methods: Methods, role: Role) -> None:
        super().__init__({name: method for name, method in methods.items() if name in role.commands})
        self.role: Final = role
        self.everything: Final = methods


class Failure(NamedTuple):
    """A command was refused or failed."""

    error: CommandError


class Pending(NamedTuple):
    """A command goes on: its result is awaited by :func:`finish`."""

    awaitable: Awaitable[Any]


def build_methods(table: Mapping[str, Handler]) -> dict[str, Method]:
    """The method table. Raises ValueError for a handler whose command the catalogue does not know."""
    unknown = sorted(set(table) - set(COMMANDS))
    if unknown:
        raise ValueError(f"Handlers without a declaration in the catalogue: {', '.join(unknown)}")
    return {name: Method(COMMANDS[name], handler) for name, handler in table.items()}


def find(methods: Methods, name: str) -> Method:
    """The method of this name. Raises CommandNotFound in QEMU's words, PermissionRefused for what a role may not."""
    method = methods.get(name)
    if method is None:
        if isinstance(methods, RoleMethods) and name in methods.everything:
            raise methods.role.refusal(name)
        raise CommandNotFound(f"The command {name} has not been found")
    return method


def prepare(method: Method, raw: Raw | UnsetType = UNSET) -> Arguments[Any]:
    """Decode and check a command's arguments. Raises InvalidArgument, before anything has happened."""
    if raw is UNSET and method.no_arguments is not None:
        return method.no_arguments
    return decode_arguments(method.spec, raw)


def execute(method: Method, call: Call, arguments: Arguments[Any]) -> Any:
    """Call a handler: returns its result, a :class:`Failure` or a :class:`Pending`. Never raises.

    A result that is not pending is final: the call has succeeded, or has failed, when this returns.
    """
    if _begin.on:
        _begin(session=_session(call), command=method.name)
    call.arguments = arguments
    result = _jsonrpc_call(method.request, call, method.invoke)
    try:
        value = result._value.result
    except AttributeError:
        value = _failure_of(result)
        call.fail()
    if hasattr(value, "__await__"):
        return Pending(value)
    if _end.on:
        _end(session=_session(call), command=method.name, ok=type(value) is not Failure)
    if method.audited:
        call.server.audited(call, method.name, value.error if type(value) is Failure else None)
    return _EMPTY if value is None else value


async def finish(method: Method, call: Call, pending: Pending) -> Any:
    """Await a pending command: returns its result or a :class:`Failure`. Never raises, unless it is cancelled."""
    try:
        result = await lean.async_call(method.request, call, _guarded_wait(method.name, pending.awaitable))
    except BaseException:  # cancelled: the server ends
        call.fail()
        raise
    try:
        value = result._value.result
    except AttributeError:
        value = _failure_of(result)
        call.fail()
    if _end.on:
        _end(session=_session(call), command=method.name, ok=type(value) is not Failure)
    if method.audited:
        call.server.audited(call, method.name, value.error if type(value) is Failure else None)
    return _EMPTY if value is None else value


def _without(spec: CommandSpec) -> Arguments[Any] | None:
    try:
        return decode_arguments(spec)
    except CommandError:
        return None


def _guarded(name: str, handler: Handler) -> Callable[[Call], Any]:
    right, success, new = lean.Right, lean.SuccessResult, tuple.__new__

    def invoke(call: Call) -> Any:
        try:
            # SuccessResult(...) is this, after a step in Python: it is a NamedTuple.
            return right(new(success, (handler(call, call.arguments),)))
        except Exception as error:  # noqa: BLE001 - the boundary: see the module's text
            return _refused(name, error)

    return invoke


def _guarded_wait(name: str, awaitable: Awaitable[Any]) -> Callable[[Call], Awaitable[Any]]:
    async def wait(_call: Call) -> Any:
        try:
            return lean.Right(lean.SuccessResult(await awaitable))
        except Exception as error:  # noqa: BLE001 - the boundary: see the module's text
            return _refused(name, error)

    return wait


def _refused(name: str, error: Exception) -> Any:
    """An error result. What is no CommandError is a defect of ours: its traceback goes to the log, once."""
    if not isinstance(error, CommandError):
        _log.error("Command %s failed by a defect of vfiod", name, exc_info=error)
        error = InternalError(f"The command {name} failed by a defect of vfiod; its log has the details")
    return lean.Left(lean.ErrorResult(error.jsonrpc_code, str(error), Failure(error)))


def _failure_of(result: Any) -> Failure:
    """The Failure that :func:`_refused` put into a jsonrpcserver Result."""
    failure = result._error.data
    if type(failure) is Failure:
        return failure
    # jsonrpcserver itself objected to something; it has logged what.
    return Failure(InternalError("The command failed by a defect of vfiod; its log has the details"))


def _session(call: Call) -> int | None:
    return None if call.session is None else call.session.id
