"""``human-monitor-command`` over QMP, with a real device: what a person does first."""

from __future__ import annotations

from typing import Any

Monitor = Any

UUID = "11111111-2222-3333-4444-555555555555"


def test_a_persons_first_session(monitor: Monitor) -> None:
    peer = monitor.qmp()

    def say(line: str) -> str:
        reply = peer.execute("human-monitor-command", **{"command-line": line})
        assert isinstance(reply["return"], str), reply
        return str(reply["return"])

    assert say("info status") == "running  yes\nstatus   running\n"
    types = peer.execute("query-mdev-types")["return"]
    assert say(f"mdev-create {types[0]['parent']} {types[0]['type']} uuid={UUID}") == f"uuid  {UUID}\n"
    assert say(f"device_add vfio-pci,id=n0,mdev={UUID}") == ""
    assert "vendor-id    0x" in say("info devices n0")
    assert say("region-read n0 bar0 0 size=4").startswith("value  0x")
    assert say("region-read n0 bar9 0 size=4").startswith("Error: ")
    assert "bar2" in say("info regions n0")
    assert say("device_del n0") == ""
    assert say(f"device_add vfio-pci,id=n0,mdev={UUID}x").startswith("Error: ")
    assert say("nope") == "Error: unknown command: 'nope'; try help\n"
