"""Errors: the classes QMP knows, codes that do not collide, errnos by name."""

from __future__ import annotations

import errno

import pytest

from vfiod.protocol import errors
from vfiod.protocol.errors import (
    Busy,
    CommandError,
    DeviceNotFound,
    ErrorClass,
    OperationFailed,
    RemoteError,
    TimedOut,
    VfiodError,
)
from vfiod.protocol.limits import MAX_ERROR_TEXT


def all_of(kind: type[VfiodError]) -> set[type[VfiodError]]:
    return {kind}.union(*(all_of(sub) for sub in kind.__subclasses__()))


def test_every_public_error_is_in_the_tree_and_in_all() -> None:
    public = {kind.__name__ for kind in all_of(VfiodError) if kind.__module__ == errors.__name__}
    assert public <= set(errors.__all__)


def test_classes_are_qemus() -> None:
    # qapi/error.json; KVMMissingCap is QEMU's alone.
    assert {member.value for member in ErrorClass} == {
        "GenericError",
        "CommandNotFound",
        "DeviceNotActive",
        "DeviceNotFound",
    }


def test_codes_tell_command_errors_apart() -> None:
    kinds = all_of(CommandError) - {CommandError}
    codes = [kind.jsonrpc_code for kind in kinds if kind.__module__ == errors.__name__]
    assert len(set(codes)) == len(codes)
    for code in codes:
        # Reserved by the specification, or the server's own range (section 5.1).
        assert code in (-32601, -32602, -32603) or -32099 <= code <= -32000


def test_errnos_are_names() -> None:
    assert errors.errno_name(errno.EBUSY) == "EBUSY"
    assert errors.errno_name(99999) == "errno 99999"
    assert CommandError("x", errno=errno.ENODEV).errno == "ENODEV"
    assert CommandError("x", errno="ENODEV").errno == "ENODEV"
    assert CommandError("x").errno is None
    assert (Busy("x").errno, TimedOut("x").errno) == ("EBUSY", "ETIMEDOUT")


@pytest.mark.parametrize(("advice", "ending"), [("", "EBUSY"), ("close it first", "EBUSY: close it first")])
def test_an_operation_that_failed_says_which_on_what_and_why(advice: str, ending: str) -> None:
    error = OperationFailed("VFIO_GROUP_SET_CONTAINER", "group 7", errno=errno.EBUSY, advice=advice)
    assert str(error) == f"VFIO_GROUP_SET_CONTAINER on group 7 failed with {ending}"
    assert (error.operation, error.what, error.errno) == ("VFIO_GROUP_SET_CONTAINER", "group 7", "EBUSY")


def test_a_remote_error_keeps_what_the_server_said() -> None:
    error = RemoteError("device_del", "DeviceNotFound", "Device 'x' not found", "ENODEV")
    assert str(error) == "device_del: Device 'x' not found"
    assert (error.command, error.remote_class, error.errno) == ("device_del", "DeviceNotFound", "ENODEV")


def test_what_is_repeated_is_bounded_and_keeps_both_ends() -> None:
    text = str(DeviceNotFound.named("x" * 1_000_000))
    assert len(text) < MAX_ERROR_TEXT + 100
    assert text.startswith("Device 'xxx") and text.endswith("xxx' not found")
    assert "[... 998019 characters ...]" in text


def test_what_is_repeated_cannot_command_a_terminal() -> None:
    assert str(DeviceNotFound.named("\x1b[2J\x00é")) == "Device '\\x1b[2J\\x00é' not found"
