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
    # A picture, unless another form is asked for: nodes and edges are for programs.
    drawn = say("info topology")
    assert "n0" in drawn and "\N{BOX DRAWINGS LIGHT UP AND RIGHT}" in drawn and "edges" not in drawn
    assert "edges:" in say("info topology json")
    assert say("info topology dot").startswith("digraph topology {")
    assert say("device_del n0") == ""
    assert say(f"device_add vfio-pci,id=n0,mdev={UUID}x").startswith("Error: ")
    assert say("nope") == "Error: unknown command: 'nope'; try help\n"


def test_a_line_of_a_megabyte_and_a_long_pattern_are_refused_at_once(monitor: Any) -> None:
    peer = monitor.qmp()
    reply = peer.execute("human-monitor-command", command_line="x" * 1_000_000)
    assert reply["error"]["desc"] == "Parameter 'command-line' expects at most 4095 characters, not 1000000"
    reply = peer.execute("trace-event-get-state", name="*x" * 500_000)
    assert reply["error"]["desc"] == "Parameter 'name' expects at most 255 characters, not 1000000"
    assert peer.execute("human-monitor-command", command_line="info name " * 409)["return"].startswith("Error: ")
