"""QMP on the wire: QEMU's transcript (field.md section 1.2), negotiation, order, out of band, introspection."""

from __future__ import annotations

import json
import re
import socket
from typing import Any

import pytest

from vfiod.protocol.catalogue import COMMANDS, Empty
from vfiod.protocol.catalogue.devices import DeviceAdded
from vfiod.protocol.limits import MAX_INBAND_QUEUE

Monitor = Any
Peer = Any


def _error(desc: str, kind: str = "GenericError") -> dict[str, Any]:
    return {"error": {"class": kind, "desc": desc}}


def test_greeting_is_one_crlf_line_and_names_oob(monitor: Monitor) -> None:
    peer = monitor.qmp(negotiate=False)
    other = socket.socket(socket.AF_UNIX)
    other.connect(monitor.qmp_path)
    with other:
        line = other.recv(65536)
    assert line.endswith(b"\r\n")
    assert line.count(b"\n") == 1
    greeting = json.loads(line)["QMP"]
    assert greeting["capabilities"] == ["oob"]
    assert {type(greeting["version"]["qemu"][part]) for part in ("major", "minor", "micro")} == {int}
    assert isinstance(greeting["version"]["package"], str)
    assert peer.execute("qmp_capabilities") == {"return": {}}


def test_before_negotiation_one_command_and_no_events(monitor: Monitor) -> None:
    peer = monitor.qmp(negotiate=False)
    refused = _error("Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound")
    assert peer.execute("query-status") == refused
    assert peer.execute("nope") == refused
    monitor.emit(DeviceAdded(device="a", path="/machine/peripheral/a"))
    assert peer.execute("qmp_capabilities") == {"return": {}}
    assert peer.events == []
    again = peer.execute("qmp_capabilities")
    assert again == _error("Capabilities negotiation is already complete, command ignored", "CommandNotFound")
    monitor.emit(DeviceAdded(device="b", path="/machine/peripheral/b"))
    event = peer.event()
    assert list(event) == ["timestamp", "event", "data"]
    assert event["data"] == {"device": "b", "path": "/machine/peripheral/b", "seq": 2}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (b'{"execute":"query-name","id":{"a":[1]}}', b'{"return": {"name": "vm0"}, "id": {"a": [1]}}\r\n'),
        (b'{"execute":"query-name","id":null}', b'{"return": {"name": "vm0"}, "id": null}\r\n'),
        (
            b'{"execute":"nope","id":7}',
            b'{"id": 7, "error": {"class": "CommandNotFound", "desc": "The command nope has not been found"}}\r\n',
        ),
        (
            b'{"execute":"query-name","bogus":1}',
            b'{"error": {"class": "GenericError", "desc": "QMP input member \'bogus\' is unexpected"}}\r\n',
        ),
        (
            b'{"execute":"query-name","arguments":{"z":1}}',
            b'{"error": {"class": "GenericError", "desc": "Parameter \'z\' is unexpected"}}\r\n',
        ),
        (
            b'{"execute":"query-name","arguments":5}',
            b'{"error": {"class": "GenericError", "desc": "QMP input member \'arguments\' must be an object"}}\r\n',
        ),
        (b"{}", b'{"error": {"class": "GenericError", "desc": "QMP input lacks member \'execute\'"}}\r\n'),
        (
            b'{"execute":"query-name","exec-oob":"query-name"}',
            b'{"error": {"class": "GenericError", "desc": '
            b"\"QMP input member 'execute' clashes with 'exec-oob'\"}}\r\n",
        ),
        (b"[1,2]", b'{"error": {"class": "GenericError", "desc": "QMP input must be a JSON object"}}\r\n'),
        (b"5 ", b'{"error": {"class": "GenericError", "desc": "QMP input must be a JSON object"}}\r\n'),
        (b"{'execute':'query-name'}", b'{"return": {"name": "vm0"}}\r\n'),
        (
            b'{"execute":"getfd","arguments":{"fdname":"a"}}',
            b'{"error": {"class": "GenericError", "desc": "No file descriptor supplied via SCM_RIGHTS"}}\r\n',
        ),
        (
            b'{"execute":"closefd","arguments":{"fdname":"zz"}}',
            b'{"error": {"class": "GenericError", "desc": "File descriptor named \'zz\' not found"}}\r\n',
        ),
        (
            b'{"execute":"remove-fd","arguments":{"fdset-id":9}}',
            b'{"error": {"class": "GenericError", "desc": "File descriptor named \'fdset-id:9\' not found"}}\r\n',
        ),
    ],
)
def test_golden_transcript_byte_for_byte(monitor: Monitor, text: bytes, line: bytes) -> None:
    peer = monitor.qmp(oob=text.find(b"exec-oob") >= 0)
    peer.send(text)
    got = peer.line()
    # Spaces after ':' and ',' are QEMU's; the order of members is what the transcript fixes.
    assert re.sub(rb'(?<=[:,]) (?=["{\[\d]|null)', b"", got) == re.sub(rb'(?<=[:,]) (?=["{\[\d]|null)', b"", line)


@pytest.mark.parametrize(
    ("text", "desc"),
    [
        (b'{"execute":}\n', "JSON parse error, .*"),
        (b'{"execute": "query-name"\xff', "JSON parse error, .*"),
        (b'{"execute": "query-name"\x01', "JSON parse error, .*"),
        (b"[" * 1100 + b"\n", "JSON nesting depth limit exceeded"),
    ],
)
def test_what_is_no_json_costs_one_error_and_the_session_goes_on(monitor: Monitor, text: bytes, desc: str) -> None:
    peer = monitor.qmp()
    # The peer that sends garbage resynchronises as QMP says: with a byte that no JSON has.
    peer.send(text + b'\xff{"execute":"query-name","id":1}')
    first = peer.message()
    assert first["error"]["class"] == "GenericError"
    assert re.fullmatch(desc, first["error"]["desc"])
    assert "id" not in first
    following = peer.message()
    while "error" in following:
        following = peer.message()
    assert following == {"return": {"name": "vm0"}, "id": 1}


def test_concatenated_pipelined_and_bytewise(monitor: Monitor) -> None:
    peer = monitor.qmp()
    one = b'{"execute":"query-status","id":%d}'
    peer.send(b"".join(one % number for number in range(20)))
    assert [peer.message()["id"] for _ in range(20)] == list(range(20))
    for byte in one % 77:
        peer.send(bytes([byte]))
    assert peer.message() == {"return": {"running": True, "status": "running"}, "id": 77}
    # More than one turn of the server, and more than one read.
    peer.send(b"".join(one % number for number in range(5000)))
    assert [peer.message()["id"] for _ in range(5000)] == list(range(5000))


def test_inband_commands_wait_for_each_other_and_answer_in_order(monitor: Monitor) -> None:
    peer = monitor.qmp()
    other = monitor.qmp()
    peer.send(b'{"execute":"system_reset","id":1}{"execute":"query-status","id":2}{"execute":]}')
    assert other.execute("query-name") == {"return": {"name": "vm0"}}  # others go on
    monitor.release()
    assert peer.message() == {"return": {}, "id": 1}
    assert peer.message()["id"] == 2
    assert peer.message()["error"]["desc"].startswith("JSON parse error")  # errors keep their place, too


def test_out_of_band_overtakes(monitor: Monitor) -> None:
    peer = monitor.qmp(oob=True)
    peer.send(b'{"execute":"system_reset","id":"slow"}{"exec-oob":"query-status","id":"oob"}')
    assert peer.message()["id"] == "oob"
    peer.send(b'{"exec-oob":"system_reset","id":"no"}')
    assert peer.message() == {
        "id": "no",
        "error": {"class": "GenericError", "desc": "The command system_reset does not support OOB"},
    }
    monitor.release()
    assert peer.message()["id"] == "slow"


def test_out_of_band_must_be_enabled(monitor: Monitor) -> None:
    peer = monitor.qmp()
    peer.send(b'{"exec-oob":"query-status"}')
    assert peer.message() == _error("QMP input member 'exec-oob' is unexpected")


def test_the_eighth_in_flight_stops_reading_until_one_is_done(monitor: Monitor) -> None:
    peer = monitor.qmp(oob=True)
    peer.send(b"".join(b'{"execute":"system_reset","id":%d}' % number for number in range(MAX_INBAND_QUEUE)))
    assert monitor.gate.entered.acquire(timeout=20)
    monitor.gate.entered.release()
    peer.send(b'{"exec-oob":"query-status","id":"oob"}')
    session = monitor.on_loop(lambda: next(iter(monitor.server._sessions.values())))
    monitor.until(lambda: not session._reading)
    peer.socket.settimeout(0.05)
    with pytest.raises(TimeoutError):
        peer.message()
    peer.socket.settimeout(20)
    monitor.release()
    answers = [peer.message()["id"] for _ in range(2)]
    assert sorted(map(str, answers)) == ["0", "oob"]
    for _ in range(MAX_INBAND_QUEUE - 1):
        monitor.release()
    assert [peer.message()["id"] for _ in range(MAX_INBAND_QUEUE - 1)] == list(range(1, MAX_INBAND_QUEUE))


def test_quit_tells_answers_and_hangs_up(monitor: Monitor) -> None:
    peer, other = monitor.qmp(), monitor.qmp()
    peer.send(b'{"execute":"quit","id":1}')
    event = peer.message()
    assert event["event"] == "SHUTDOWN"
    assert event["data"] == {"guest": False, "reason": "host-qmp-quit", "seq": 1}
    assert peer.message() == {"return": {}, "id": 1}
    assert peer.message() is None
    assert other.message()["event"] == "SHUTDOWN"
    assert other.message() is None


def test_query_commands_are_the_catalogue_and_each_is_there(monitor: Monitor) -> None:
    peer = monitor.qmp()
    names = [info["name"] for info in peer.execute("query-commands")["return"]]
    assert names == list(COMMANDS)


def test_schema_is_closed_and_oob_is_marked(monitor: Monitor) -> None:
    peer = monitor.qmp()
    entities = peer.execute("query-qmp-schema")["return"]
    commands = {one["name"]: one for one in entities if one["meta-type"] == "command"}
    assert set(commands) == set(COMMANDS)
    assert {name for name, one in commands.items() if one.get("allow-oob")} == {
        name for name, spec in COMMANDS.items() if spec.allow_oob
    }


def test_small_queries(monitor: Monitor) -> None:
    peer = monitor.qmp()
    assert peer.execute("query-uuid") == {"return": {"UUID": "00000000-0000-0000-0000-000000000000"}}
    assert peer.execute("query-version")["return"]["package"] == "vfiod"
    assert peer.execute("query-stats", target="session")["return"][0]["qom-path"] == "/sessions/1"
    chosen = peer.execute("query-stats", target="session", providers=[{"provider": "vfiod", "names": ["commands"]}])
    assert [stat["name"] for stat in chosen["return"][0]["stats"]] == ["commands"]
    assert peer.execute("query-stats", target="session", providers=[{"provider": "kvm"}]) == {"return": []}
    assert peer.execute("query-stats", target="vm")["return"][0]["provider"] == "vfiod"
    sessions = peer.execute("query-machine")["return"]["sessions"]
    assert [(one["id"], one["dialect"], one["negotiated"], one["events-lost"]) for one in sessions] == [
        (1, "qmp", True, 0)
    ]


def test_trace_points_by_command(monitor: Monitor) -> None:
    peer = monitor.qmp()
    off = [{"name": "irq_eoi", "state": "disabled"}]
    assert peer.execute("trace-event-get-state", name="irq_eoi") == {"return": off}
    assert peer.execute("trace-event-set-state", name="irq_e*", enable=True) == {"return": {}}
    assert peer.execute("trace-event-get-state", name="irq_eoi")["return"][0]["state"] == "enabled"
    assert peer.execute("trace-event-set-state", name="*", enable=False) == {"return": {}}
    assert peer.execute("trace-event-get-state", name="irq_eoi") == {"return": off}
    assert peer.execute("trace-event-set-state", name="nope", enable=True) == _error('unknown event "nope"')
    assert peer.execute("trace-event-set-state", name="nope", enable=True, ignore_unavailable=True) == {"return": {}}


def test_a_defect_gives_away_nothing_and_the_session_goes_on(
    monitor: Monitor, caplog: pytest.LogCaptureFixture
) -> None:
    from vfiod.server.monitor.dispatch import Method

    def broken(_call: Any, _arguments: Any) -> Any:
        raise RuntimeError("secret /path")

    async def broken_later(_call: Any, _arguments: Any) -> Any:
        raise RuntimeError("secret /path")

    peer = monitor.qmp()
    for handler in (broken, broken_later, lambda _c, _a: object()):
        caplog.clear()
        monitor.server.role("operator")["query-name"] = Method(COMMANDS["query-name"], handler)
        reply = peer.execute("query-name")
        assert reply["error"]["class"] == "GenericError"
        assert "secret" not in json.dumps(reply)
        tracebacks = [record for record in caplog.records if record.exc_info]
        assert len(tracebacks) == 1
    assert peer.execute("query-status")["return"]["running"] is True


def test_a_result_of_nothing_is_an_empty_object(monitor: Monitor) -> None:
    peer = monitor.qmp()
    peer.send(b'{"execute":"system_reset"}')
    monitor.release(Empty())
    assert peer.line() in (b'{"return": {}}\r\n', b'{"return":{}}\r\n')
