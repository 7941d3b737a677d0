"""Every argument of every command, with values that fit and values that never could: always an answer, never a defect.

Driven from the catalogue, so that a new command is tried as soon as it is declared.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import pytest
from msgspec import inspect

from vfiod.protocol.catalogue import COMMANDS
from vfiod.protocol.fd import FileDescriptor

Monitor = Any

UUID = "11111111-2222-4333-8444-555555555555"

NOT_HERE = {"quit", "system_reset", "device-reset"}  # the first ends the server, the others wait for their test

FITTING: dict[str, dict[str, Any]] = {
    "device_add": {"driver": "vfio-pci", "host": "01:00.0", "x-dry-run": True},
    "device_del": {"id": "nobody"},
    "dma-map": {"iova": 0, "size": 4096, "memory-backend": "ram0"},
    "dma-unmap": {"iova": 0, "size": 4096},
    "irq-eoi": {"device": "n0", "index": "intx"},
    "irq-mask": {"device": "n0", "index": "intx"},
    "irq-route": {"device": "n0", "index": "intx"},
    "irq-start": {"device": "n0", "index": "msi", "eventfds": [{"vector": 0, "trigger": "event"}]},
    "irq-stop": {"device": "n0", "index": "msi"},
    "irq-trigger": {"device": "n0", "index": "msi"},
    "irq-unmask": {"device": "n0", "index": "intx"},
    "mdev-create": {"parent": "primer", "type": "nothing"},
    "object-add": {"qom-type": "memory-backend-fd", "id": "ram0", "fd": "memory"},
    "region-map": {"device": "n0", "region": "bar0"},
    "region-unmap": {"device": "n0", "region": "bar2"},
    "region-read": {"device": "n0", "region": "bar0", "offset": 0, "size": 4},
    "region-write": {"device": "n0", "region": "bar2", "offset": 0, "size": 4, "value": 0},
    "remove-fd": {"fdset-id": 77},
}

VALUES: list[Any] = [
    *(None, True, -1, 0, 1, 7, 2**31, 2**53, 2**63, 2**64 - 1, 2**64, 2**70, -(2**63) - 1, 10**40, 1.5, 1e300),
    *("", "0", "n0", "ram0", "event", "memory", "/dev/fdset/9", "/dev/fdset/", "\0", "a\0b", "n0\n", "../..", "*", "é"),
    *("x" * 300, "x" * 1_000_000, UUID, "00:1f.7", "/sys/devices", "bar2", "intx"),
    *([], {}, [None], [[]], [0], [-1], [0, 0], [2**70], list(range(3000)), {"a": [1]}, [{}]),
    *([{"vector": 0, "trigger": "memory"}], [{"vector": 0, "trigger": "event", "resample": "event"}]),
    *([{"index": "msi", "number": 5}], [{"provider": "vfiod", "names": ["devices"]}]),
]


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - NOT_HERE))
def test_no_value_is_a_defect(monitor: Monitor, caplog: pytest.LogCaptureFixture, name: str) -> None:
    peer = monitor.qmp()
    with FileDescriptor(os.memfd_create("memory")) as memory, FileDescriptor(os.eventfd(0)) as event:
        os.ftruncate(memory.number, 1 << 20)
        for fd, names in ((memory, ("ram", "memory")), (event, ("event",))):
            for fdname in names:
                assert "return" in peer.execute("getfd", fd.number, fdname=fdname)
    assert "return" in peer.execute("object-add", qom_type="memory-backend-fd", id="ram0", fd="ram")
    assert "return" in peer.execute("mdev-create", parent="primer", type="primer-pci", uuid=UUID)
    assert "return" in peer.execute("device_add", driver="vfio-pci", id="n0", mdev=UUID)
    fitting = FITTING.get(name, {})
    members = [field.encode_name for field in inspect.type_info(COMMANDS[name].arguments).fields]  # type: ignore[attr-defined]
    with caplog.at_level(logging.ERROR):
        for member in ("no-such-member", *members):
            for value in VALUES:
                peer.send({"execute": name, "arguments": {**fitting, member: value}, "id": 1})
                reply = peer.reply()
                assert reply["id"] == 1
                if "error" in reply:
                    assert "defect" not in reply["error"]["desc"], (member, value)
                    assert len(reply["error"]["desc"]) < 2100
                for fd in peer.fds:
                    fd.close()
                peer.fds.clear()
    assert not [record for record in caplog.records if record.exc_info]
    assert monitor.jsonrpc().call("query-status")["result"]["running"] is True
