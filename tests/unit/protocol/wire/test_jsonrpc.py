"""JSON-RPC 2.0: the examples of the specification's section 7, and what it leaves to the server."""

from __future__ import annotations

import json

import pytest
from msgspec import UNSET, Raw, UnsetType

from vfiod.protocol.catalogue.devices import DeviceAdded
from vfiod.protocol.errors import (
    Busy,
    CommandNotFound,
    DeviceNotFound,
    InvalidArgument,
    InvalidRequest,
    JsonSyntaxError,
    LimitExceeded,
    WireError,
)
from vfiod.protocol.limits import MAX_BATCH
from vfiod.protocol.wire import jsonrpc


def body(raw: Raw | UnsetType) -> bytes:
    assert isinstance(raw, Raw)
    return bytes(raw)


def single(text: bytes) -> jsonrpc.Request | jsonrpc.Rejected:
    decoded = jsonrpc.decode_request(text)
    assert isinstance(decoded, jsonrpc.Single), decoded
    return decoded.item


def rejected(text: bytes) -> jsonrpc.Rejected:
    item = single(text)
    assert isinstance(item, jsonrpc.Rejected), item
    return item


def test_a_call() -> None:
    request = single(b'{"jsonrpc": "2.0", "method": "subtract", "params": {"subtrahend": 23, "minuend": 42}, "id": 3}')
    assert isinstance(request, jsonrpc.Request)
    assert (request.command, body(request.arguments)) == ("subtract", b'{"subtrahend": 23, "minuend": 42}')
    assert (body(request.id), request.is_notification) == (b"3", False)


def test_a_notification() -> None:
    request = single(b'{"jsonrpc": "2.0", "method": "foobar"}')
    assert isinstance(request, jsonrpc.Request)
    assert (request.arguments, request.id, request.is_notification) == (UNSET, UNSET, True)


def test_an_id_of_null_is_no_notification() -> None:
    request = single(b'{"jsonrpc":"2.0","method":"a","id":null}')
    assert isinstance(request, jsonrpc.Request)
    assert (body(request.id), request.is_notification) == (b"null", False)


def test_an_empty_array_is_no_arguments() -> None:
    request = single(b'{"jsonrpc":"2.0","method":"a","params":[ ],"id":1}')
    assert isinstance(request, jsonrpc.Request)
    assert request.arguments is UNSET and body(request.id) == b"1"


@pytest.mark.parametrize(
    ("text", "error", "id"),
    [
        (b'{"jsonrpc": "2.0", "method": "foobar, "params": "bar", "baz]', JsonSyntaxError, b"null"),
        (b'{"jsonrpc": "2.0", "method": 1, "params": "bar"}', InvalidRequest, b"null"),
        (b'{"jsonrpc": "2.0", "method": 1, "id": "a"}', InvalidRequest, b'"a"'),
        (b'{"jsonrpc": "1.0", "method": "a", "id": 2}', InvalidRequest, b"2"),
        (b'{"method": "a", "id": 2}', InvalidRequest, b"2"),
        (b'{"jsonrpc": "2.0", "id": 2}', InvalidRequest, b"2"),
        (b'{"jsonrpc": "2.0", "method": "a", "params": 5, "id": 2}', InvalidRequest, b"2"),
        (b'{"jsonrpc": "2.0", "method": "a", "parms": {}, "id": 2}', InvalidRequest, b"2"),
        (b'{"jsonrpc": "2.0", "method": "a", "id": {}}', InvalidRequest, b"null"),
        (b'{"jsonrpc": "2.0", "method": "a", "id": true}', InvalidRequest, b"null"),
        (b'{"jsonrpc": "2.0", "method": 5, "id": [1]}', InvalidRequest, b"null"),
        (b'{"jsonrpc": "2.0", "method": "a", "id": 1, "id": 2}', JsonSyntaxError, b"null"),
        (b'{"jsonrpc": "2.0", "method": 5, "id": 1, "id": 2}', JsonSyntaxError, b"null"),
        (b'{"jsonrpc": "2.0", "method": "a", "params": {"x": 1, "x": 2}, "id": 1}', JsonSyntaxError, b"null"),
        (b'{"jsonrpc": "2.0", "method": 5, "id": "\xc3("}', JsonSyntaxError, b"null"),
        (b"{'jsonrpc': '2.0', 'method': 'a', 'id': 1}", JsonSyntaxError, b"null"),
        (b"5", InvalidRequest, b"null"),
        (b'"a"', InvalidRequest, b"null"),
        (b"[]", InvalidRequest, b"null"),
        (b'[{"jsonrpc": "2.0", "method"]', JsonSyntaxError, b"null"),
        (b'[{"jsonrpc":"2.0","method":"a","id":1,"id":1}]', JsonSyntaxError, b"null"),
        (
            b'{"jsonrpc":"2.0","method":"a","id":1,"params":{"a":' + b"[" * 1010 + b"]" * 1010 + b"}}",
            WireError,
            b"null",
        ),
    ],
)
def test_what_is_no_request(text: bytes, error: type[WireError], id: bytes) -> None:
    refusal = rejected(text)
    assert isinstance(refusal.error, error), refusal.error
    assert body(refusal.id) == id
    reply = json.loads(jsonrpc.encode_error(refusal.error, refusal.id))
    assert reply["error"]["code"] == (-32700 if error is JsonSyntaxError else -32600)


def test_refusals_say_what_and_what_would_be_right() -> None:
    assert str(rejected(b'{"method":"a"}').error) == "Not a JSON-RPC 2.0 request: it lacks member 'jsonrpc'"
    assert str(rejected(b'{"jsonrpc":"2.0","method":"a","parms":1}').error) == (
        "Not a JSON-RPC 2.0 request: it has the unexpected member 'parms'"
    )
    assert "double quotes only" in str(rejected(b"{'jsonrpc':'2.0','method':'a'}").error)
    assert str(rejected(b'{"jsonrpc":"2.0" "method":"a"}').error) == "JSON parse error, expected separator in dict"


def test_errors_of_the_stream_pass_through() -> None:
    error = LimitExceeded("too long")
    decoded = jsonrpc.decode_request(error)
    assert isinstance(decoded, jsonrpc.Single) and isinstance(decoded.item, jsonrpc.Rejected)
    assert (decoded.item.error, bytes(decoded.item.id)) == (error, b"null")


def test_a_batch_of_good_and_bad() -> None:
    batch = jsonrpc.decode_request(
        b'[{"jsonrpc":"2.0","method":"sum","params":{"a":1},"id":"1"},{"jsonrpc":"2.0","method":"notify_hello"},1,{"foo":"boo"}]'
    )
    assert isinstance(batch, jsonrpc.Batch)
    call, notification, number, stranger = batch.items
    assert isinstance(call, jsonrpc.Request) and body(call.id) == b'"1"'
    assert isinstance(notification, jsonrpc.Request) and notification.is_notification
    assert isinstance(number, jsonrpc.Rejected) and bytes(number.id) == b"null"
    assert isinstance(stranger, jsonrpc.Rejected) and isinstance(stranger.error, InvalidRequest)


@pytest.mark.parametrize(("count", "taken"), [(MAX_BATCH, True), (MAX_BATCH + 1, False)])
def test_batches_are_bounded(count: int, taken: bool) -> None:
    decoded = jsonrpc.decode_request(b"[" + b",".join([b'{"jsonrpc":"2.0","method":"a"}'] * count) + b"]")
    if taken:
        assert isinstance(decoded, jsonrpc.Batch) and len(decoded.items) == count
    else:
        assert isinstance(decoded, jsonrpc.Single) and isinstance(decoded.item, jsonrpc.Rejected)
        assert isinstance(decoded.item.error, LimitExceeded) and str(MAX_BATCH) in str(decoded.item.error)


# --- replies: literal bytes -----------------------------------------------------------------------------------
def test_result() -> None:
    assert jsonrpc.encode_result({}, Raw(b"1")) == b'{"jsonrpc":"2.0","result":{},"id":1}\r\n'
    assert jsonrpc.encode_result("é", Raw('"ß"'.encode())) == b'{"jsonrpc":"2.0","result":"\\u00e9","id":"\\u00df"}\r\n'


def test_error() -> None:
    assert jsonrpc.encode_error(Busy("Taken"), Raw(b"1")) == (
        b'{"jsonrpc":"2.0","error":{"code":-32004,"message":"Taken",'
        b'"data":{"class":"GenericError","errno":"EBUSY"}},"id":1}\r\n'
    )
    assert jsonrpc.encode_error(DeviceNotFound.named("x")) == (
        b'{"jsonrpc":"2.0","error":{"code":-32001,"message":"Device \'x\' not found",'
        b'"data":{"class":"DeviceNotFound"}},"id":null}\r\n'
    )


@pytest.mark.parametrize(
    ("error", "code"), [(CommandNotFound("x"), -32601), (InvalidArgument("x"), -32602), (JsonSyntaxError("x"), -32700)]
)
def test_the_specifications_codes(error: WireError, code: int) -> None:
    assert json.loads(jsonrpc.encode_error(error))["error"]["code"] == code


def test_batch_of_replies() -> None:
    replies = [jsonrpc.encode_result(1, Raw(b"1")), jsonrpc.encode_error(Busy("x"), Raw(b"2"))]
    line = jsonrpc.encode_batch(replies)
    assert line.count(b"\r\n") == 1 and line.endswith(b"]\r\n")
    assert [reply["id"] for reply in json.loads(line)] == [1, 2]
    assert jsonrpc.encode_batch([]) == b""


def test_notification() -> None:
    assert jsonrpc.encode_notification(DeviceAdded(device="d", path="/p"), 5, 1, 2) == (
        b'{"jsonrpc":"2.0","method":"DEVICE_ADDED","params":{"device":"d","path":"/p","seq":5,'
        b'"timestamp":{"seconds":1,"microseconds":2}}}\r\n'
    )


# --- the client's side ----------------------------------------------------------------------------------------
def test_what_the_client_sends_the_server_reads() -> None:
    request = single(jsonrpc.encode_request("a", {"b": 1}, "é"))
    assert isinstance(request, jsonrpc.Request)
    assert (request.command, body(request.arguments), body(request.id)) == ("a", b'{"b":1}', b'"\\u00e9"')
    notification = single(jsonrpc.encode_request("a"))
    assert isinstance(notification, jsonrpc.Request) and notification.is_notification


def test_what_the_server_sends_the_client_reads() -> None:
    (result,) = jsonrpc.decode_message(jsonrpc.encode_result([1], Raw(b"1")))
    assert isinstance(result, jsonrpc.Result) and (body(result.value), body(result.id)) == (b"[1]", b"1")
    (error,) = jsonrpc.decode_message(jsonrpc.encode_error(Busy("x"), Raw(b"1")))
    assert isinstance(error, jsonrpc.Error)
    assert (error.code, error.desc, error.error_class, error.errno) == (-32004, "x", "GenericError", "EBUSY")
    (event,) = jsonrpc.decode_message(jsonrpc.encode_notification(DeviceAdded(path="/p"), 5, 1, 2))
    assert isinstance(event, jsonrpc.Event)
    assert (event.name, event.seq, event.seconds, event.microseconds) == ("DEVICE_ADDED", 5, 1, 2)
    batch = jsonrpc.encode_batch([jsonrpc.encode_result(1, Raw(b"1")), jsonrpc.encode_result(2, Raw(b"2"))])
    assert [bytes(item.value) for item in jsonrpc.decode_message(batch) if isinstance(item, jsonrpc.Result)] == [
        b"1",
        b"2",
    ]


def test_a_foreign_servers_error_needs_no_data() -> None:
    (error,) = jsonrpc.decode_message(b'{"jsonrpc":"2.0","error":{"code":-32601,"message":"No"},"id":null}')
    assert isinstance(error, jsonrpc.Error) and (error.error_class, error.errno) == ("GenericError", None)


@pytest.mark.parametrize(
    "text", [b"5", b"{}", b'{"jsonrpc":"2.0"}', b'{"jsonrpc":"2.0","result":1}', b"[1]", b"{", b"[{]"]
)
def test_what_is_no_message_is_a_wire_error(text: bytes) -> None:
    with pytest.raises(WireError, match="The server sent"):
        jsonrpc.decode_message(text)
