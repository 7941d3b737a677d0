"""Human commands: what a line means, and what a result looks like. Errors are text, names stay."""

from __future__ import annotations

import asyncio
import os
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from vfiod.protocol.catalogue import COMMANDS
from vfiod.protocol.catalogue.monitor import HumanMonitorCommand
from vfiod.protocol.catalogue.regions import Area, RegionReadResult
from vfiod.protocol.errors import CommandError, InvalidArgument
from vfiod.protocol.fd import FileDescriptor
from vfiod.server.commands.call import Call
from vfiod.server.commands.human import format_value, human_monitor_command, parse_line
from vfiod.server.fds import FdNames
from vfiod.server.kernel.kinds import kind_of


@pytest.mark.parametrize(
    ("line", "command", "arguments"),
    [
        ("info devices", "query-devices", {}),
        ("info devices nic0", "query-devices", {"id": "nic0"}),
        ("query-devices id=nic0", "query-devices", {"id": "nic0"}),
        ("device_del nic0 force=on", "device_del", {"id": "nic0", "force": True}),
        ("device_del id=nic0 timeout-ms=0x10", "device_del", {"id": "nic0", "timeout-ms": 16}),
        (
            "device_add vfio-pci,id=a,host=01:00.0,x-dry-run=on",
            "device_add",
            {"driver": "vfio-pci", "id": "a", "host": "01:00.0", "x-dry-run": True},
        ),
        (
            "object-add memory-backend-fd,id=m,fd=x",
            "object-add",
            {"qom-type": "memory-backend-fd", "id": "m", "fd": "x"},
        ),
        (
            "region-read nic0 bar0 0x10 size=4",
            "region-read",
            {"device": "nic0", "region": "bar0", "offset": 16, "size": 4},
        ),
        ("region-read nic0 2 0", "region-read", {"device": "nic0", "region": 2, "offset": 0}),
        ("irq-start nic0 msi 0,1,2", "irq-start", {"device": "nic0", "index": "msi", "vectors": [0, 1, 2]}),
        (
            """irq-start nic0 eventfds='[{"vector": 0, "trigger": "t"}]'""",
            "irq-start",
            {"device": "nic0", "eventfds": [{"vector": 0, "trigger": "t"}]},
        ),
        (
            """mdev-create p t parameters='{"memory": 4096}'""",
            "mdev-create",
            {"parent": "p", "type": "t", "parameters": {"memory": 4096}},
        ),
        ("query-stats session", "query-stats", {"target": "session"}),
        ("query-devices nonsense=5", "query-devices", {"nonsense": "5"}),  # the check of arguments names it
        ("device_del 'a b'", "device_del", {"id": "a b"}),
    ],
)
def test_what_a_line_means(line: str, command: str, arguments: dict[str, Any]) -> None:
    import shlex

    spec, given = parse_line(shlex.split(line))
    assert spec.name == command
    assert given == arguments


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["nope"], "unknown command: 'nope'; try help"),
        (["info", "nope"], "unknown command: 'nope'; try help"),
        (["human-monitor-command", "x"], "unknown command: 'human-monitor-command'; try help"),
        (["qmp_capabilities"], "unknown command: 'qmp_capabilities'; try help"),
        (["query-name", "x"], "query-name takes no further argument 'x'"),
    ],
)
def test_what_no_line_means(words: list[str], error: str) -> None:
    with pytest.raises(CommandError) as refused:
        parse_line(words)
    assert str(refused.value) == error


def test_what_is_meant_as_json_must_be() -> None:
    with pytest.raises(InvalidArgument, match="is not JSON"):
        parse_line(["irq-start", "nic0", "vectors=[1,"])


def test_every_command_can_be_said() -> None:
    for name in COMMANDS:
        if name not in ("human-monitor-command", "qmp_capabilities"):
            assert parse_line([name])[0].name == name


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        ({}, ""),
        ("", ""),
        ("text", "text\n"),
        (5, "5\n"),
        ([], "(none)\n"),
        ({"a": 1, "long-name": True, "none": None, "list": [1, 2], "empty": []},
         "a          1\nlong-name  yes\nnone       -\nlist       1,2\nempty      -\n"),
        ([{"id": "a", "n": 1}, {"id": "bc", "m": False}], "id  n  m\na   1  -\nbc  -  no\n"),
        ([{"id": "a", "areas": [{"offset": 16}]}], "id\na\n    areas:\n      offset\n      0x10\n"),
        ([{"id": "a", "flags": {"x": True, "y": False, "z": 3}}], "id  flags\na   x z=3\n"),
        ([{"id": "a", "wide": "w" * 200}], f"id a\n  wide  {'w' * 200}\n"),
        (RegionReadResult(value=255), "value  0xff\n"),
        (RegionReadResult(data=bytes(range(18))),
         "data:\n  00000000  00 01 02 03 04 05 06 07 08 09 0a 0b 0c 0d 0e 0f\n  00000010  10 11\n"),
        ([Area(offset=4096, size=8192)], "offset  size\n0x1000  8192\n"),
        (msgspec.Raw(b'{"a": 1}'), "a  1\n"),
    ],
)  # fmt: skip
def test_what_a_result_looks_like(value: Any, text: str) -> None:
    assert format_value(value) == text


def _human(call: Call, line: str) -> str:
    async def run() -> str:
        value = human_monitor_command(call, HumanMonitorCommand(command_line=line))
        return value if isinstance(value, str) else await value

    return asyncio.run(run())


def test_help_names_every_command_and_its_arguments() -> None:
    call = Call(cast("Any", None), cast("Any", None))
    text = _human(call, "help")
    assert all(f"\n{name} " in text for name in COMMANDS if name not in ("human-monitor-command", "qmp_capabilities"))
    assert _human(call, "help device_del").startswith("device_del id=... [force=...] [timeout-ms=...]\n")
    assert "info devices" in _human(call, "info")
    assert _human(call, "help nope") == "Error: unknown command: 'nope'; try help\n"
    assert _human(call, "") == ""
    assert _human(call, "  ") == ""
    assert _human(call, "info 'devices").startswith("Error: The line cannot be read: No closing quotation")
    assert "``" not in _human(call, "help device_add") + text


def test_an_error_is_text_and_the_names_it_used_stay() -> None:
    names = FdNames(kind_of)
    names.receive([FileDescriptor(os.eventfd(0))])
    names.name("e")
    session = cast("Any", SimpleNamespace(id=1, names=names, allows=lambda _command: True))
    noted: list[tuple[Any, str, str]] = []
    log = SimpleNamespace(audited=lambda call, name, error: noted.append((call.arguments, name, str(error))))
    call = Call(cast("Any", SimpleNamespace(add_container=None)), cast("Any", log), session)
    line = "object-add vfio-container,id=c,fd=e"
    assert _human(call, line) == "Error: Parameter 'fd': fd 'e' is an eventfd, expected vfio-container\n"
    assert _human(call, "device_del") == "Error: Parameter 'id' is missing\n"
    call.fd("fd", "e").close()
    assert _human(call, "nope").startswith("Error: ")
    assert call.succeed() is None
    # Each that named a command is told to the audit log as that command; arguments that cannot be read are not.
    assert [(arguments is None, name) for arguments, name, _ in noted] == [(False, "object-add"), (True, "device_del")]
    assert noted[1][2] == "Parameter 'id' is missing"
    assert names.look("e") is not None
    names.close()
