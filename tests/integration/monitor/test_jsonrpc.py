"""JSON-RPC 2.0 on the wire: single, batch, notification; order per device; events as notifications."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from vfiod.protocol.catalogue import Empty
from vfiod.protocol.catalogue.devices import DeviceAdded
from vfiod.protocol.fd import FileDescriptor
from vfiod.protocol.limits import MAX_BATCH, MAX_JSONRPC_IN_FLIGHT

Monitor = Any


def _request(method: str, number: Any = 1, **params: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "method": method, "params": params, "id": number}


def _reset(number: int, device: str) -> dict[str, Any]:
    return _request("device-reset", number, id=device)


def test_single(monitor: Monitor) -> None:
    peer = monitor.jsonrpc()
    assert peer.call("query-name") == {"jsonrpc": "2.0", "result": {"name": "vm0"}, "id": 1}
    for number in (0, "a", None, 1.5):
        peer.send(_request("query-name", number))
        assert peer.reply()["id"] == number


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (b"{oops\xff", -32700),
        (b"[]", -32600),
        (b"1 ", -32600),
        (b'{"jsonrpc": "2.0"}', -32600),
        (b'{"jsonrpc": "1.0", "method": "query-name", "id": 1}', -32600),
        (b'{"execute": "query-name"}', -32600),
        (b'{"jsonrpc": "2.0", "method": "nope", "id": 1}', -32601),
        (b'{"jsonrpc": "2.0", "method": "qmp_capabilities", "id": 1}', -32601),
        (b'{"jsonrpc": "2.0", "method": "query-name", "params": {"z": 1}, "id": 1}', -32602),
    ],
)
def test_errors_have_their_codes_and_the_session_goes_on(monitor: Monitor, text: bytes, code: int) -> None:
    peer = monitor.jsonrpc()
    peer.send(text)
    reply = peer.message()
    assert reply["error"]["code"] == code
    assert reply["error"]["message"]
    assert "class" in reply["error"].get("data", {"class": ""})
    assert peer.call("query-name")["result"] == {"name": "vm0"}


def test_notifications_get_no_answer_not_even_an_error(monitor: Monitor) -> None:
    peer = monitor.jsonrpc()
    for method in ("query-name", "nope", "query-name"):
        peer.send({"jsonrpc": "2.0", "method": method})
    peer.send({"jsonrpc": "2.0", "method": "query-name", "params": {"z": 1}})
    assert peer.call("query-status")["result"]["running"] is True


def test_a_batch_is_answered_as_a_whole_in_its_order(monitor: Monitor) -> None:
    peer = monitor.jsonrpc()
    peer.send(
        [
            _reset(1, "a"),
            _request("query-name", 2),
            {"jsonrpc": "2.0", "method": "query-name"},
            5,
            _request("nope", 3),
        ]
    )
    assert peer.call("query-name")["id"] == 1  # others overtake a batch that waits
    monitor.release()
    replies = peer.message()
    assert [reply["id"] for reply in replies] == [1, 2, None, 3]
    assert [reply.get("error", {}).get("code") for reply in replies] == [None, None, -32600, -32601]


def test_a_batch_of_notifications_is_not_answered(monitor: Monitor) -> None:
    peer = monitor.jsonrpc()
    peer.send([{"jsonrpc": "2.0", "method": "query-name"}] * 3)
    assert peer.call("query-name")["id"] == 1


def test_too_large_a_batch_is_refused(monitor: Monitor) -> None:
    peer = monitor.jsonrpc()
    peer.send([_request("query-name", number) for number in range(MAX_BATCH + 1)])
    assert peer.message()["error"]["code"] == -32600
    peer.send([_request("query-name", number) for number in range(MAX_BATCH)])
    assert len(peer.message()) == MAX_BATCH


def test_one_devices_commands_keep_their_order_and_others_do_not_wait(monitor: Monitor) -> None:
    peer = monitor.jsonrpc()
    for request in (_reset(1, "a"), _reset(2, "a"), _reset(3, "b"), _reset(4, "/machine/peripheral/a")):
        peer.send(request)
    monitor.until(lambda: len(monitor.gate.waiting) == 2)
    assert monitor.gate.order == ["device-reset a", "device-reset b"]
    monitor.release()
    assert peer.message()["id"] == 1
    monitor.until(lambda: len(monitor.gate.waiting) == 2)
    assert monitor.gate.order[2:] == ["device-reset a"]
    monitor.release()  # b
    assert peer.message()["id"] == 3
    monitor.release()
    assert peer.message()["id"] == 2
    monitor.release()
    assert peer.message()["id"] == 4
    assert monitor.gate.order[3:] == ["device-reset /machine/peripheral/a"]
    assert monitor.on_loop(lambda: next(iter(monitor.server._sessions.values()))._devices) == {}


def test_a_failing_command_lets_the_next_of_its_device_go(monitor: Monitor) -> None:
    peer = monitor.jsonrpc()
    peer.send(_request("region-read", 1, device="a", region=0, offset=0, size=4))
    assert peer.message()["error"]["data"]["class"] == "DeviceNotFound"
    for request in (_reset(2, "a"), _request("region-read", 3, device="a", region=0, offset=0, size=4)):
        peer.send(request)
    monitor.release()
    assert [peer.message()["id"] for _ in range(2)] == [2, 3]


def test_requests_in_flight_are_bounded(monitor: Monitor) -> None:
    peer = monitor.jsonrpc()
    for number in range(MAX_JSONRPC_IN_FLIGHT + 5):
        peer.send(_reset(number, f"d{number}"))
    monitor.until(lambda: len(monitor.gate.waiting) == MAX_JSONRPC_IN_FLIGHT)
    session = monitor.on_loop(lambda: next(iter(monitor.server._sessions.values())))
    monitor.until(lambda: not session._reading)
    for number in range(MAX_JSONRPC_IN_FLIGHT + 5):
        monitor.release()
        assert peer.message()["id"] == number


def test_events_are_notifications(monitor: Monitor) -> None:
    peer = monitor.jsonrpc()
    assert peer.call("query-name")["id"] == 1
    monitor.emit(DeviceAdded(device="a", path="/machine/peripheral/a"))
    event = peer.event()
    assert event["method"] == "DEVICE_ADDED"
    assert "id" not in event
    assert event["params"]["seq"] == 1
    assert set(event["params"]["timestamp"]) == {"seconds", "microseconds"}


def test_a_batch_or_notification_carries_no_fds(monitor: Monitor) -> None:
    import os

    peer = monitor.jsonrpc()

    def give(call: Any) -> Any:
        call.attach(FileDescriptor(os.eventfd(0)))
        return Empty()

    from vfiod.protocol.catalogue import COMMANDS
    from vfiod.server.monitor.dispatch import Method

    monitor.server.role("operator")["query-name"] = Method(COMMANDS["query-name"], lambda call, _: give(call))
    assert "result" in peer.call("query-status")  # the server has its end of the connection
    before = monitor.fds()
    peer.send([_request("query-name", 1)])
    assert "cannot carry an fd" in json.dumps(peer.message())
    peer.send({"jsonrpc": "2.0", "method": "query-name"})
    peer.send(_request("query-name", 2))
    assert peer.message()["id"] == 2
    assert len(peer.fds) == 1
    monitor.until(lambda: monitor.fds() == before + 1)  # ours; the server closes its own once it is sent


def test_channel_io(monitor: Monitor, tmp_path: Any) -> None:
    """Binary values are base64, errors have their words, interrupts nobody waits for are notifications."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(4096))
    peer = monitor.jsonrpc()
    made = peer.call("mdev-create", parent="fba", type="fba-ccw", parameters={"file": str(disk)})["result"]
    peer.call("device_add", driver="vfio-ccw", id="disk", mdev=made["uuid"])
    # No guest memory is there: the program cannot be fetched, which is a program check.
    for orb in ({"orb": "AAAAAADA/wAAABAA"}, {"orb_fields": {"cpa": 0x1000}}):
        result = peer.call("ccw-request", device="disk", **orb)["result"]
        assert result["condition-code"] == 0
        irb = base64.b64decode(result["irb"])
        assert len(irb) == 96 and irb[9] == 0x20
        assert result["decoded"]["subchannel-status"] == ["program-check"]
    error = peer.call("ccw-request", device="disk", orb="AAAA")["error"]
    assert "An ORB has 12 bytes, got 3" in error["message"]
    assert peer.call("ccw-clear", device="disk")["result"]["condition-code"] == 0
    while (event := peer.event())["method"] != "CCW_IO":
        pass
    assert event["params"]["decoded"]["functions"] == ["clear"]
