"""Messages of the bus: literal bytes, round trips, and what is refused with which words."""

from __future__ import annotations

import contextlib
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET

from vfiod.protocol.catalogue import COMMANDS, EVENTS
from vfiod.protocol.catalogue.devices import DeviceAdded
from vfiod.protocol.catalogue.monitor import Shutdown, ShutdownCause
from vfiod.protocol.catalogue.regions import RegionReadResult
from vfiod.protocol.errors import (
    DeviceNotFound,
    InvalidArgument,
    InvalidRequest,
    JsonSyntaxError,
    LimitExceeded,
    OperationFailed,
    WireError,
)
from vfiod.protocol.limits import MAX_COLLECTIONS, MAX_MESSAGE_BYTES
from vfiod.protocol.wire import packed
from vfiod.protocol.wire.arguments import convert_arguments

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 63) - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


def test_the_bytes_of_a_call() -> None:
    """Fixmap, fixstr: nothing that another msgpack would not read."""
    assert packed.encode_call("quit", id=1) == b"\x83\xa7jsonrpc\xa32.0\xa6method\xa4quit\xa2id\x01"
    assert packed.decode_call(b"\x82\xa7jsonrpc\xa32.0\xa6method\xa4quit") == packed.Call("quit", UNSET, UNSET)


@given(st.text(), st.dictionaries(st.text(), JSON), st.none() | st.text() | st.integers(-(1 << 63), (1 << 64) - 1))
def test_calls_round_trip(command: str, arguments: dict[str, object], id: str | int | None) -> None:
    """Whatever JSON can say comes over as it was."""
    call = packed.decode_call(packed.encode_call(command, arguments, id))
    assert call == packed.Call(command, arguments, id)


def test_results_and_errors() -> None:
    """Bytes stay bytes; an error has its class, its sentence and its errno."""
    answer = packed.decode_answer(packed.encode_result(RegionReadResult(data=b"\xff\x00"), "a"))
    assert isinstance(answer, packed.Answer)
    assert answer.value == {"data": b"\xff\x00"}
    assert packed.decode_result("region-read", answer.value) == RegionReadResult(data=b"\xff\x00")
    failure = packed.decode_answer(packed.encode_error(OperationFailed("VFIO_X", "n0", errno="EBUSY"), 2))
    assert isinstance(failure, packed.Failure)
    assert (failure.errno, failure.id, "VFIO_X" in failure.desc) == ("EBUSY", 2, True)
    unknown = packed.decode_answer(packed.encode_error(DeviceNotFound.named("zz")))
    assert isinstance(unknown, packed.Failure)
    assert (unknown.error_class, unknown.id) == ("DeviceNotFound", None)


def test_events_and_topics() -> None:
    """An event's topic names it and its device; its number and time travel with its data."""
    added = DeviceAdded(device="n0", path="/p")
    assert packed.topic_of(added) == b"DEVICE_ADDED/n0"
    assert packed.topic_of(DeviceAdded(path="/p")) == b"DEVICE_ADDED/"
    assert packed.topic_of(Shutdown(guest=False, reason=ShutdownCause.HOST_SIGNAL)) == b"SHUTDOWN/"
    notice = packed.decode_notice(packed.encode_notice(added, 7, 11, 13))
    assert notice == packed.Notice("DEVICE_ADDED", {"device": "n0", "path": "/p"}, 7, 11, 13)
    assert packed.encode_notice(added, 7, 11, 13) == msgpack.packb(
        {
            "jsonrpc": "2.0",
            "method": "DEVICE_ADDED",
            "params": {
                **msgspec.to_builtins(added, order="sorted"),
                "seq": 7,
                "timestamp": {"seconds": 11, "microseconds": 13},
            },
        }
    )


def test_every_event_has_room_for_its_number_and_time() -> None:
    """Its members and those two are a map whose length is in its first byte."""
    for spec in EVENTS.values():
        assert len(msgspec.structs.fields(spec.data)) + 2 <= 15, spec.name


@pytest.mark.parametrize(
    ("payload", "kind", "words"),
    [
        (b"", JsonSyntaxError, "no msgpack"),
        (b"\xc1", JsonSyntaxError, "no msgpack"),
        (b"\x01\x02", JsonSyntaxError, "no msgpack"),
        (b"\xdd\xff\xff\xff\xff", JsonSyntaxError, "exceeds"),
        (b"\x91" * 9000 + b"\xc0", LimitExceeded, "Nesting"),
        (b"\xd6\x05aaaa", InvalidRequest, "extension type 5"),
        (b"\xd6\xffaaaa", InvalidRequest, "must be a map"),
        (b"\x81\x01\x02", InvalidRequest, "A key must be text"),
        (b"\x82\xa1a\x01\xa1a\x02", InvalidRequest, "'a' is there twice"),
        (msgpack.packb([]), InvalidRequest, "must be a map"),
        (msgpack.packb({}), InvalidRequest, "'jsonrpc' must be '2.0'"),
        (msgpack.packb({"jsonrpc": "2.0"}), InvalidRequest, "'method' must be a string"),
        (msgpack.packb({"jsonrpc": "2.0", "method": "x", "params": []}), InvalidRequest, "'params' must be an object"),
        (msgpack.packb({"jsonrpc": "2.0", "method": "x", "id": True}), InvalidRequest, "'id' must be"),
        (msgpack.packb({"jsonrpc": "2.0", "method": "x", "y": 1}), InvalidRequest, "unexpected member 'y'"),
        (b"\xc0" * (MAX_MESSAGE_BYTES + 1), LimitExceeded, "at most"),
    ],
)
def test_what_is_no_call(payload: bytes, kind: type[WireError], words: str) -> None:
    """Each with its error and its reason."""
    refused = packed.decode_call(payload)
    assert isinstance(refused, packed.Refused)
    assert type(refused.error) is kind
    assert words in str(refused.error)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_call_or_refused(payload: bytes) -> None:
    """Nothing else comes out, and nothing is raised."""
    assert isinstance(packed.decode_call(payload), packed.Call | packed.Refused)
    for decode in (packed.decode_answer, packed.decode_notice):
        with contextlib.suppress(WireError):
            decode(payload)


def test_arguments_in_the_same_words() -> None:
    """What a JSON dialect would say of wrong arguments, the bus says; bytes may come as they are or in base64."""
    write = COMMANDS["region-write"]
    for data in (b"\x00\x01", "AAE="):
        given_data = {"device": "n0", "region": "bar0", "offset": 0, "data": data}
        assert convert_arguments(write, given_data).data == b"\x00\x01"  # type: ignore[attr-defined]
    for values, words in (
        ({"device": 5}, "Invalid parameter type for 'device', expected: string"),
        ({}, "Parameter 'device' is missing"),
        ({"device": "n0", "region": "bar0", "offset": -1, "data": b""}, "'offset' expects a non-negative value"),
        ({"device": "n0", "region": "bar0", "offset": 0, "data": b"x", "z": 1}, "Parameter 'z' is unexpected"),
        ({"device": b"n0", "region": "bar0", "offset": 0, "data": b"x"}, "not what it takes"),
    ):
        with pytest.raises(InvalidArgument) as refused:
            convert_arguments(write, values)
        assert words in str(refused.value)


@pytest.mark.parametrize("one", [[], {}])
def test_no_more_lists_and_maps_than_the_limit(one: Any) -> None:
    def call(count: int) -> packed.Call | packed.Refused:
        return packed.decode_call(msgpack.packb({"jsonrpc": "2.0", "method": "a", "params": {"x": [one] * count}}))

    assert isinstance(call(MAX_COLLECTIONS - 3), packed.Call)
    refused = call(MAX_COLLECTIONS - 2)
    assert isinstance(refused, packed.Refused)
    assert str(refused.error) == f"A call holds at most {MAX_COLLECTIONS} lists and maps"


@pytest.mark.parametrize("member", [{"code": "x"}, {"code": []}, {"code": 1.5}])
def test_an_error_whose_code_is_no_number_is_refused(member: dict[str, Any]) -> None:
    """Found by the fuzzer: it was a TypeError or a ValueError of the client's caller."""
    with pytest.raises(InvalidRequest, match="where a whole number belongs"):
        packed.decode_answer(msgpack.packb({"jsonrpc": "2.0", "id": 1, "error": {"message": "no", **member}}))


@pytest.mark.parametrize("stamp", [{"seconds": "x"}, {"seconds": float("inf")}, {"microseconds": None}])
def test_an_event_whose_time_is_no_number_is_refused(stamp: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="where a whole number belongs"):
        packed.decode_notice(msgpack.packb({"method": "A", "params": {"seq": 1, "timestamp": stamp}}))
