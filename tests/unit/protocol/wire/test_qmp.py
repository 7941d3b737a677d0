"""QMP messages: requests as the server reads them, replies as the client reads them, the bytes in between."""

from __future__ import annotations

import json
from typing import Any

import pytest
from msgspec import UNSET, Raw, UnsetType

from vfiod.protocol.catalogue.devices import DeviceAdded
from vfiod.protocol.catalogue.interrupts import Irq
from vfiod.protocol.catalogue.monitor import VersionInfo, VersionTriple
from vfiod.protocol.catalogue.regions import RegionRead, RegionReadResult
from vfiod.protocol.errors import Busy, DeviceNotFound, InternalError, JsonSyntaxError, LimitExceeded, WireError
from vfiod.protocol.wire import qmp

VERSION = VersionInfo(qemu=VersionTriple(major=0, minor=1, micro=0), package="vfiod")


def body(raw: Raw | UnsetType) -> bytes:
    assert isinstance(raw, Raw)
    return bytes(raw)


def request_of(text: bytes, *, oob_enabled: bool = True) -> qmp.Request:
    request = qmp.decode_request(text, oob_enabled=oob_enabled)
    assert isinstance(request, qmp.Request), request
    return request


def rejected(text: bytes, *, oob_enabled: bool = True) -> qmp.Rejected:
    refusal = qmp.decode_request(text, oob_enabled=oob_enabled)
    assert isinstance(refusal, qmp.Rejected), refusal
    return refusal


# --- requests -------------------------------------------------------------------------------------------------
def test_the_smallest_request() -> None:
    request = request_of(b'{"execute":"quit"}\r\n')
    assert (request.command, request.arguments, request.id, request.oob) == ("quit", UNSET, UNSET, False)


def test_a_whole_request() -> None:
    request = request_of(b' { "execute" : "a" , "arguments" : { "b" : [1] } , "id" : { "c" : null } } ')
    assert request.command == "a"
    assert body(request.arguments) == b'{ "b" : [1] }'
    assert body(request.id) == b'{ "c" : null }'


def test_out_of_band() -> None:
    request = request_of(b'{"exec-oob":"irq-eoi","arguments":{},"id":1}')
    assert (request.command, request.oob, body(request.arguments), body(request.id)) == ("irq-eoi", True, b"{}", b"1")


def test_out_of_band_has_to_be_negotiated() -> None:
    refusal = rejected(b'{"exec-oob":"irq-eoi","id":1}', oob_enabled=False)
    assert str(refusal.error) == "QMP input member 'exec-oob' is unexpected"
    assert body(refusal.id) == b"1"


@pytest.mark.parametrize(
    ("text", "desc", "id"),
    [
        (b"[1,2]", "QMP input must be a JSON object", None),
        (b"5", "QMP input must be a JSON object", None),
        (b"{}", "QMP input lacks member 'execute'", None),
        (b'{"id":7}', "QMP input lacks member 'execute'", b"7"),
        (b'{"execute":1,"id":7}', "QMP input member 'execute' must be a string", b"7"),
        (b'{"execute":"a","arguments":[],"id":7}', "QMP input member 'arguments' must be an object", b"7"),
        (b'{"execute":"a","arguments":null,"id":7}', "QMP input member 'arguments' must be an object", b"7"),
        (b'{"execute":"a","bogus":1,"id":7}', "QMP input member 'bogus' is unexpected", b"7"),
        (b'{"execute":"a","exec-oob":"b","id":7}', "QMP input member 'execute' clashes with 'exec-oob'", b"7"),
    ],
)
def test_json_that_is_no_request(text: bytes, desc: str, id: bytes | None) -> None:
    refusal = rejected(text)
    assert str(refusal.error) == desc
    assert (None if refusal.id is UNSET else body(refusal.id)) == id


@pytest.mark.parametrize(
    "text",
    [
        b'{"execute":"a","execute":"a"}',
        b'{"execute":"a","id":0,"id":0}',
        b'{"execute":"a","id":1,"\\u0069d":2}',
        b'{"execute":"a","arguments":{"b":1,"b":2}}',
        b'{"execute":"a","arguments":{"b":[{"c":{"d":1,"e":2,"d":3}}]}}',
        b"{'execute':'a','arguments':{'b':1,\"b\":2}}",
        b'{"execute":"a","arguments":{},"arguments":{}}',
        b'{"execute":"a","id":{"x":1,"x":1}}',
        b'{"execute":"a","arguments":{"data":"' + b"A" * 5000 + b'","b":1,"b":2}}',
        b'{"execute":"a","arguments":{"data":"' + b"A" * 100_000 + b'","b":1,"b":2}}',
    ],
)
def test_a_member_given_twice_is_refused_wherever_it_is(text: bytes) -> None:
    refusal = rejected(text)
    assert isinstance(refusal.error, JsonSyntaxError)
    assert "duplicate key" in str(refusal.error)


@pytest.mark.parametrize(
    "text",
    [
        b'{"execute":"execute","id":"id"}',
        b'{"execute":"a","arguments":{"a":"a","b":"b","arguments":"id"},"id":"execute"}',
        b'{"execute":"a","arguments":{"list":[{"v":1,"t":"x"},{"v":1,"t":"x"}]}}',
        b'{"execute":"a","arguments":{"a":":","b":"\\":","c":"\\\\"}}',
        b'{"execute":"a","arguments":{"data":"' + b"A" * 100_000 + b'","other":"' + b"A" * 100_000 + b'"}}',
    ],
)
def test_equal_strings_are_not_equal_members(text: bytes) -> None:
    assert json.loads(body(request_of(text).arguments or Raw(b"null"))) == json.loads(text).get("arguments")


def test_single_quotes() -> None:
    request = request_of(b"{'execute': 'a', 'arguments': {'it\\'s': 'a \"b\"', \"c\\'d\": '\\\\'}, 'id': 'x'}")
    assert json.loads(body(request.arguments)) == {"it's": 'a "b"', "c'd": "\\"}
    assert body(request.id) == b'"x"'


@pytest.mark.parametrize(
    ("id", "echoed"),
    [
        (b"null", b"null"),
        (b"1.50", b"1.50"),
        (b"123456789012345678901234567890", b"123456789012345678901234567890"),
        (b'"\\u00e9\\ud83d\\ude00"', b'"\\u00e9\\ud83d\\ude00"'),
        ('"é😀"'.encode(), b'"\\u00e9\\ud83d\\ude00"'),
        (b'{"a":\r\n\t[1]}', b'{"a":  \t[1]}'),
        (b"[" * 1020 + b"]" * 1020, b"[" * 1020 + b"]" * 1020),
    ],
    ids=["null", "float", "huge", "escaped", "unicode", "lines", "deep"],
)
def test_an_id_comes_back_as_it_was_on_one_ascii_line(id: bytes, echoed: bytes) -> None:
    request = request_of(b'{"execute":"a","id":' + id + b"}")
    assert qmp.encode_return({}, request.id) == b'{"return":{},"id":' + echoed + b"}\r\n"


@pytest.mark.parametrize("bad", [b"\xff", b"\xc3(", b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80"])
def test_bytes_that_are_no_utf8_are_refused_even_in_the_id(bad: bytes) -> None:
    for text in (b'{"execute":"a","id":"' + bad + b'"}', b'{"execute":"' + bad + b'"}', b'{"x":{"y":"' + bad + b'"}}'):
        assert str(rejected(text).error) == "JSON parse error, invalid UTF-8 sequence in string"


@pytest.mark.parametrize("escape", ["\\ud800", "\\udc00", "\\ud800\\u0041", "\\uffff", "\\ufdd0", "\\ud83f\\udfff"])
def test_escapes_that_are_no_characters_are_refused(escape: str) -> None:
    for text in (f'{{"execute":"a","id":"{escape}"}}', f'{{"execute":"{escape}"}}'):
        assert "is not a valid Unicode character" in str(rejected(text.encode()).error)


def test_what_only_looks_like_no_character_is_taken() -> None:
    assert request_of(b'{"execute":"a","id":"\\\\ud800"}').id is not UNSET
    assert request_of(b'{"execute":"a","id":"\\ud83d\\ude00 \\uffee"}').id is not UNSET


def test_a_long_text_that_is_no_json_is_told_where() -> None:
    refusal = rejected(b'{"execute":"a","arguments":{"data":"' + b"A" * 100_000 + b'" 1}}')
    assert str(refusal.error) == "JSON parse error, expected ',' or '}' (byte 100038)"


def test_errors_of_the_stream_pass_through() -> None:
    error = LimitExceeded("too long")
    refusal = qmp.decode_request(error, oob_enabled=True)
    assert isinstance(refusal, qmp.Rejected)
    assert (refusal.error, refusal.id) == (error, UNSET)


# --- replies: literal bytes -----------------------------------------------------------------------------------
def test_greeting() -> None:
    assert qmp.encode_greeting(VERSION) == (
        b'{"QMP":{"version":{"qemu":{"major":0,"minor":1,"micro":0},"package":"vfiod"},"capabilities":["oob"]}}\r\n'
    )


def test_return() -> None:
    assert qmp.encode_return({}) == b'{"return":{}}\r\n'
    assert qmp.encode_return(RegionReadResult(value=7), Raw(b"1")) == b'{"return":{"value":7},"id":1}\r\n'
    assert qmp.encode_return(RegionReadResult(data=b"\x00\xff")) == b'{"return":{"data":"AP8="}}\r\n'
    assert qmp.encode_return("é\n") == b'{"return":"\\u00e9\\n"}\r\n'


def test_error() -> None:
    assert qmp.encode_error(DeviceNotFound.named("zz"), Raw(b"null")) == (
        b'{"id":null,"error":{"class":"DeviceNotFound","desc":"Device \'zz\' not found"}}\r\n'
    )
    assert qmp.encode_error(Busy("Taken")) == b'{"error":{"class":"GenericError","desc":"Taken","errno":"EBUSY"}}\r\n'
    assert b'"errno"' not in qmp.encode_error(InternalError("A defect"))


def test_a_name_that_is_no_unicode_can_still_be_told() -> None:
    # A file name of the host, decoded by os.fsdecode.
    line = qmp.encode_error(Busy("Held by /dev/\udcff\udcfe"), Raw(b"1"))
    assert json.loads(line)["error"]["desc"] == "Held by /dev/\\udcff\\udcfe"
    assert json.loads(qmp.encode_return([{"path\udcff": ["\udcff"]}]))["return"] == [{"path\\udcff": ["\\udcff"]}]


def test_event() -> None:
    assert qmp.encode_event(DeviceAdded(device="é", path="/p"), 5, 1, 2) == (
        b'{"timestamp":{"seconds":1,"microseconds":2},"event":"DEVICE_ADDED",'
        b'"data":{"device":"\\u00e9","path":"/p","seq":5}}\r\n'
    )


@pytest.mark.parametrize("value", ["\x7f", "\u2028", "\x00", "\U0010ffff", "a\r\nb", '"\\'])
def test_every_message_is_one_ascii_line(value: str) -> None:
    for line in (qmp.encode_return(value, Raw(json.dumps(value).encode())), qmp.encode_error(WireError(value))):
        assert line.isascii() and line.endswith(b"\r\n")
        assert line.count(b"\n") == line.count(b"\r") == 1
        json.loads(line)


# --- the client's side ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (UNSET, b'{"execute":"region-read","id":1}\r\n'),
        ({"a": "é"}, b'{"execute":"region-read","arguments":{"a":"\\u00e9"},"id":1}\r\n'),
        (
            RegionRead(device="d", region="bar0", offset=0, size=4),
            b'{"execute":"region-read","arguments":{"device":"d","region":"bar0","offset":0,"size":4},"id":1}\r\n',
        ),
    ],
)
def test_encode_request(arguments: Any, expected: bytes) -> None:
    assert qmp.encode_request("region-read", arguments, 1) == expected


def test_what_the_client_sends_the_server_reads() -> None:
    request = request_of(qmp.encode_request("irq-eoi", {"device": "d"}, "é", oob=True))
    assert (request.command, request.oob, body(request.id)) == ("irq-eoi", True, b'"\\u00e9"')
    assert request_of(qmp.encode_request("quit")).arguments is UNSET


def test_what_the_server_sends_the_client_reads() -> None:
    assert qmp.decode_message(qmp.encode_greeting(VERSION)) == qmp.Greeting(VERSION, ("oob",))
    answer = qmp.decode_message(qmp.encode_return({"a": 1}, Raw(b"7")))
    assert isinstance(answer, qmp.Return)
    assert (body(answer.value), body(answer.id)) == (b'{"a":1}', b"7")
    assert qmp.decode_message(qmp.encode_error(Busy("x"))) == qmp.Error("GenericError", "x", "EBUSY", UNSET)
    event = qmp.decode_message(qmp.encode_event(Irq(device="d", index=0, vector=0, fired=3, delivered=3), 9, 1, 2))
    assert isinstance(event, qmp.Event)
    assert (event.name, event.seq, event.seconds, event.microseconds) == ("IRQ", 9, 1, 2)


def test_messages_of_a_real_qemu() -> None:
    greeting = qmp.decode_message(
        b'{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": "Debian"}, '
        b'"capabilities": ["oob"]}}'
    )
    assert isinstance(greeting, qmp.Greeting) and greeting.version.qemu.major == 10
    event = qmp.decode_message(
        b'{"timestamp": {"seconds": -1, "microseconds": -1}, "event": "RESET", '
        b'"data": {"seq": "other", "guest": false}}'
    )
    assert isinstance(event, qmp.Event) and (event.seq, event.seconds) == (None, -1)
    stop = qmp.decode_message(b'{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}')
    assert isinstance(stop, qmp.Event) and stop.data is UNSET and stop.seq is None


@pytest.mark.parametrize(
    "text",
    [b"[]", b"5", b"{}", b'{"id":1}', b'{"error":{}}', b'{"QMP":{}}', b'{"event":5}', b'{"return":', b'{"a":\xff}'],
)
def test_what_is_no_message_is_a_wire_error(text: bytes) -> None:
    with pytest.raises(WireError, match="The server sent"):
        qmp.decode_message(text)


def test_errors_of_the_stream_are_raised() -> None:
    with pytest.raises(JsonSyntaxError, match="stray"):
        qmp.decode_message(JsonSyntaxError("JSON parse error, stray 'x'"))
