"""Arguments and results: QEMU's words for what is wrong, and no wrong value let through."""

from __future__ import annotations

import json
from typing import Any

import pytest
from msgspec import UNSET, Raw

from vfiod.protocol.catalogue import COMMANDS
from vfiod.protocol.catalogue.devices import DeviceAdd, DeviceAdded, DeviceDel, OnRequest
from vfiod.protocol.catalogue.interrupts import IrqStart
from vfiod.protocol.catalogue.regions import RegionReadResult, RegionWrite
from vfiod.protocol.errors import InvalidArgument, InvalidRequest
from vfiod.protocol.limits import MAX_COLLECTIONS, MAX_REGION_TRANSFER
from vfiod.protocol.wire.arguments import decode_arguments, decode_event_data, decode_result


def decode(command: str, **arguments: Any) -> Any:
    return decode_arguments(COMMANDS[command], json.dumps(arguments).encode())


def complaint(command: str, **arguments: Any) -> str:
    with pytest.raises(InvalidArgument) as caught:
        decode(command, **arguments)
    return str(caught.value)


def test_absent_is_empty() -> None:
    for raw in (UNSET, b"{}", Raw(b" { } ")):
        assert decode_arguments(COMMANDS["query-version"], raw) == COMMANDS["query-version"].arguments()


def test_wire_names_have_hyphens() -> None:
    assert decode("device_del", id="d", force=True, **{"timeout-ms": 7}) == DeviceDel(id="d", force=True, timeout_ms=7)
    assert complaint("device_del", id="d", timeout_ms=7) == "Parameter 'timeout_ms' is unexpected"


def test_types_of_every_kind() -> None:
    added = decode("device_add", driver="vfio-pci", id="d", **{"on-request": "delete", "x-dry-run": True})
    assert added == DeviceAdd(driver="vfio-pci", id="d", on_request=OnRequest.DELETE, x_dry_run=True)
    assert decode("region-write", device="d", region=0, offset=0, data="AP8=") == RegionWrite(
        device="d", region=0, offset=0, data=b"\x00\xff"
    )
    started = decode("irq-start", device="d", eventfds=[{"vector": 1, "trigger": "t"}])
    assert isinstance(started, IrqStart) and started.eventfds is not UNSET and started.eventfds[0].vector == 1


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        # the words of QEMU's golden transcript
        ("query-version", {"z": 1}, "Parameter 'z' is unexpected"),
        ("device_add", {}, "Parameter 'driver' is missing"),
        ("device_add", {"driver": "nope", "foo": 1}, "'nope' is not a valid device model name"),
        ("device_add", {"driver": "vfio-pci", "foo": 1}, "Property 'vfio-pci.foo' not found"),
        # one wrong type of each kind
        ("device_del", {"id": 5}, "Invalid parameter type for 'id', expected: string"),
        ("device_del", {"id": None}, "Invalid parameter type for 'id', expected: string"),
        ("device_del", {"id": "d", "force": 1}, "Invalid parameter type for 'force', expected: boolean"),
        ("device_del", {"id": "d", "timeout-ms": "5"}, "Invalid parameter type for 'timeout-ms', expected: integer"),
        ("device_del", {"id": "d", "timeout-ms": 5.5}, "Invalid parameter type for 'timeout-ms', expected: integer"),
        ("device_del", {"id": "d", "timeout-ms": True}, "Invalid parameter type for 'timeout-ms', expected: integer"),
        ("qmp_capabilities", {"enable": "oob"}, "Invalid parameter type for 'enable', expected: array"),
        ("qmp_capabilities", {"enable": [1]}, "Invalid parameter type for 'enable[0]', expected: string"),
        ("irq-start", {"eventfds": [5]}, "Invalid parameter type for 'eventfds[0]', expected: object"),
        (
            "region-read",
            {"device": "d", "region": None, "offset": 0},
            "Invalid parameter type for 'region', expected: integer or string",
        ),
        # ranges and lengths
        (
            "region-read",
            {"device": "d", "region": 0, "offset": -1},
            "Parameter 'offset' expects a non-negative value",
        ),
        (
            "region-read",
            {"device": "d", "region": 0, "offset": 0, "size": 3},
            "Parameter 'size' expects 1, 2, 4 or 8, not 3",
        ),
        (
            "region-read",
            {"device": "d", "region": 0, "offset": 0, "length": 0},
            f"Parameter 'length' expects a value from 1 to {MAX_REGION_TRANSFER}, not 0",
        ),
        ("dma-unmap", {"iova": 0, "size": 0}, "Parameter 'size' expects a value of at least 1, not 0"),
        ("irq-start", {"vectors": [0, 2048]}, "Parameter 'vectors[1]' expects a value from 0 to 2047, not 2048"),
        (
            "device_add",
            {"driver": "vfio-pci", "id": "a" * 128},
            "Parameter 'id' expects at most 127 characters, not 128",
        ),
        (
            "device_add",
            {"driver": "vfio-pci", "id": "1f"},
            "Parameter 'id' expects an id: a letter, then letters, digits, '-', '.', '_' (QEMU's id_wellformed); "
            "it is '1f'",
        ),
        # words, bytes, and places in lists
        (
            "qmp_capabilities",
            {"enable": ["oob", "x"]},
            "Parameter 'enable[1]' does not accept value 'x'; it takes oob",
        ),
        (
            "query-stats",
            {"target": "x"},
            "Parameter 'target' does not accept value 'x'; it takes vm, device or session",
        ),
        (
            "region-write",
            {"device": "d", "region": 0, "offset": 0, "data": "%%"},
            "Parameter 'data' expects bytes in base64, not '%%'",
        ),
        (
            "region-write",
            {"device": "d", "region": 0, "offset": 0, "data": ""},
            "Parameter 'data' expects at least 1 bytes, not 0",
        ),
        ("irq-start", {"eventfds": [{"vector": 0}]}, "Parameter 'eventfds[0].trigger' is missing"),
        (
            "irq-start",
            {"eventfds": [{"vector": 0, "trigger": "t"}, {"vector": 1, "trigger": "t", "x": 1}]},
            "Parameter 'eventfds[1].x' is unexpected",
        ),
    ],
)
def test_what_is_wrong(command: str, arguments: dict[str, Any], words: str) -> None:
    assert complaint(command, **arguments) == words


def test_a_missing_member_goes_before_a_strange_one() -> None:
    # As QEMU's visitor: declared members in their order, then what is left over.
    assert complaint("device_del", z=1) == "Parameter 'id' is missing"


def test_a_long_wrong_value_is_shown_in_part() -> None:
    assert len(complaint("query-stats", target="x" * 100_000)) < 300


@pytest.mark.parametrize("raw", [b"[]", b"[1]", b"5", b'"x"', b"null", b" [1]"])
def test_arguments_have_names(raw: bytes) -> None:
    with pytest.raises(InvalidArgument, match="have names"):
        decode_arguments(COMMANDS["query-version"], raw)


@pytest.mark.parametrize("raw", [b'{"id":"\xff"}', b'{"id":"\\ud800"}'])
def test_text_that_is_no_unicode_is_refused(raw: bytes) -> None:
    with pytest.raises(InvalidArgument, match="cannot be read"):
        decode_arguments(COMMANDS["device_del"], raw)


def test_deep_arguments_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="nested too deeply"):
        decode_arguments(COMMANDS["device_del"], b'{"id":' + b"[" * 5000 + b"]" * 5000 + b"}")


@pytest.mark.parametrize("spec", COMMANDS.values(), ids=COMMANDS)
def test_every_command_names_what_is_wrong(spec: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"'surely-not-a-member'|is missing|not found|not a valid") as caught:
        decode_arguments(spec, b'{"surely-not-a-member":1}')
    assert "not what it takes" not in str(caught.value)


@pytest.mark.parametrize("wrong", [5, 5.5, "x", True, None, [], [5], {}, {"x": 1}, -1, 2**70, ""])
@pytest.mark.parametrize("spec", COMMANDS.values(), ids=COMMANDS)
def test_every_member_with_a_wrong_value_is_named(spec: Any, wrong: Any) -> None:
    for name in spec.arguments.__struct_encode_fields__:
        raw = json.dumps({name: wrong}).encode()
        try:
            decode_arguments(spec, raw)
        except InvalidArgument as error:
            # The generic sentence is for what the explanation does not know: there is nothing of the kind.
            assert "not what it takes" not in str(error), (name, wrong)


# --- results and events ---------------------------------------------------------------------------------------
def test_results() -> None:
    assert decode_result(COMMANDS["region-read"], b'{"value":5}') == RegionReadResult(value=5)
    assert decode_result(COMMANDS["human-monitor-command"], b'"text"') == "text"
    # A newer server may say more than this catalogue knows.
    assert decode_result(COMMANDS["region-read"], b'{"value":5,"newer":1}') == RegionReadResult(value=5)


@pytest.mark.parametrize("raw", [b'{"value":"x"}', b"[]", b"{", b'{"data":"%"}'])
def test_results_that_are_not_what_is_declared(raw: bytes) -> None:
    with pytest.raises(InvalidRequest, match="The reply to region-read"):
        decode_result(COMMANDS["region-read"], raw)


def test_event_data() -> None:
    assert decode_event_data("DEVICE_ADDED", b'{"device":"d","path":"/p","seq":3}') == DeviceAdded(
        device="d", path="/p"
    )
    assert decode_event_data("STOP", UNSET) is None
    with pytest.raises(InvalidRequest, match="The data of DEVICE_ADDED"):
        decode_event_data("DEVICE_ADDED", UNSET)


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("object-del", {"id": "ram0\n"}),
        ("device_add", {"driver": "vfio-pci", "id": "n0\n", "host": "01:00.0"}),
        ("mdev-destroy", {"uuid": "11111111-2222-3333-4444-555555555555\n"}),
    ],
)
def test_a_final_newline_is_no_part_of_a_name(command: str, arguments: dict[str, str]) -> None:
    with pytest.raises(InvalidArgument, match="expects"):
        decode_arguments(COMMANDS[command], json.dumps(arguments).encode())


@pytest.mark.parametrize("number", [1 << 32, 1 << 70])
def test_an_interrupt_number_has_32_bits(number: int) -> None:
    arguments = {"device": "n0", "first-number": number}
    with pytest.raises(InvalidArgument, match="'first-number' expects a value from 0 to 4294967295"):
        decode_arguments(COMMANDS["irq-start"], json.dumps(arguments).encode())
    with pytest.raises(InvalidArgument, match=r"'routes\[0\]\.number' expects a value from 0 to 4294967295"):
        decode_arguments(
            COMMANDS["irq-start"], json.dumps({"device": "n0", "routes": [{"index": 0, "number": number}]}).encode()
        )


def test_what_is_wrong_with_a_crowd_is_not_looked_for() -> None:
    """Its values would be made, each sixty times as large as the byte that says it."""
    assert "Parameter 'a' is unexpected" in complaint("query-name", a=[[]] * (MAX_COLLECTIONS - 2))
    assert f"hold more than {MAX_COLLECTIONS} lists and objects" in complaint("query-name", a=[[]] * MAX_COLLECTIONS)
