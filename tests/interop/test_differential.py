"""The same bytes to a real QEMU and to vfiod: the same answers, errors, framing and way back into step.

Every case runs on a fresh session of both, ends with a command whose answer is known, and what comes before that
answer is compared. Events are set aside: the two have different things to tell. Where vfiod answers differently on
purpose, :data:`INTENDED` says why, and the test insists that it still does.
"""

from __future__ import annotations

import json
import os
import random
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from vfiod.client.spawn import OwnServer

pytestmark = pytest.mark.qemu

PATIENCE = 60.0
NEGOTIATE = b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}, "id": "negotiation"}'
PLAIN = b'{"execute": "qmp_capabilities", "id": "negotiation"}'


@dataclass(frozen=True)
class Case:
    """What is sent.

    Attributes:
        chunks: writes, one after the other; in a tuple: bytes, and how many fds go with them.
        negotiate: what comes first; None: nothing.
        resync: whether 0xFF is sent before the last command, to come back into step.
        values: whether the values returned are compared too, not only that there is one.

    """

    chunks: tuple[bytes | tuple[bytes, int], ...]
    negotiate: bytes | None = NEGOTIATE
    resync: bool = False
    values: bool = False


def case(*chunks: bytes | tuple[bytes, int], **options: Any) -> Case:
    return Case(chunks, **options)


FRAMING: Final = {
    "nothing": case(b""),
    "white space": case(b" \t\r\n\r\n   "),
    "two commands without anything between": case(b'{"execute":"query-name","id":1}{"execute":"query-uuid","id":2}'),
    "twenty commands": case(
        b"".join(b'{"execute":"query-name","id":%d}\n' % number for number in range(20)),
        values=True,
    ),
    "byte by byte": case(*(bytes([byte]) for byte in b'{"execute":"query-name","id":"\\u00e9\\"}{"}'), values=True),
    "a number": case(b"5 "),
    "a negative number": case(b"-17.5e3 "),
    "a string": case(b'"text"'),
    "words": case(b"true false null "),
    "an unknown word": case(b"nil "),
    "an array": case(b"[1, 2]"),
    "an empty array": case(b"[]"),
    "an empty object": case(b"{}"),
    "a comma too many": case(b'{"execute":"query-name",}'),
    "a colon for a comma": case(b'{"execute":"query-name":"id":1}'),
    "no colon": case(b'{"execute" "query-name"}'),
    "a key that is a number": case(b'{5:"query-name"}'),
    "a closing brace too many": case(b'{"execute":"query-name"}}'),
    "a closing bracket alone": case(b"]"),
    "the wrong closing bracket": case(b'{"execute":["query-name"}]'),
    "a comma alone": case(b","),
    "a stray letter": case(b"x"),
    "HTTP": case(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", resync=True),
    "single quotes": case(b"{'execute':'query-name','id':'it\\'s \"quoted\"'}", values=True),
    "escapes in an id": case(
        b'{"execute":"query-name","id":"\\b\\f\\n\\r\\t\\/\\\\\\u0041\\ud83d\\ude00"}',
        values=True,
    ),
    "a lone surrogate": case(b'{"execute":"query-name","id":"\\ud800"}'),
    "a bad escape": case(b'{"execute":"query-name","id":"\\x41"}'),
    "half a unicode escape": case(b'{"execute":"query-name","id":"\\u12"}'),
    "an escaped NUL": case(b'{"execute":"query-name","id":"\\u0000"}'),
    "a tab within a string": case(b'{"execute":"query-name","id":"a\tb"}', resync=True),
    "a newline within a string": case(b'{"execute":"query-name","id":"a\nb"}', resync=True),
    "utf-8 in an id": case('{"execute":"query-name","id":"žluťoučký 🐎"}'.encode(), values=True),
    "a bad utf-8 sequence": case(b'{"execute":"query-name","id":"\xc3("}'),
    "an overlong utf-8 sequence": case(b'{"execute":"query-name","id":"\xc0\x80"}'),
    "percent": case(b'{"execute":%s}'),
    "leading zeroes": case(b'{"execute":"query-name","id":007}'),
    "a plus sign": case(b'{"execute":"query-name","id":+1}'),
    "a huge integer": case(b'{"execute":"query-name","id":123456789012345678901234567890}'),
    "the largest unsigned": case(b'{"execute":"query-name","id":18446744073709551615}', values=True),
    "the smallest signed": case(b'{"execute":"query-name","id":-9223372036854775808}', values=True),
    "no digits after the point": case(b'{"execute":"query-name","id":1.}'),
    "no exponent": case(b'{"execute":"query-name","id":1e}'),
    "1100 brackets": case(b"[" * 1100, resync=True),
    "1100 braces": case(b'{"a":' * 1100, resync=True),
    "1024 brackets, closed": case(b"[" * 1024 + b"]" * 1024),
    "1025 brackets, closed": case(b"[" * 1025 + b"]" * 1025),
    "truncated in a string": case(b'{"execute":"query-na', resync=True),
    "truncated in an object": case(b'{"execute":"query-name"', resync=True),
    "truncated in a word": case(b"tru", resync=True),
    "truncated in an escape": case(b'{"id":"\\', resync=True),
    "resynchronised by 0x01": case(b'{"execute":"query-na\x01'),
    "resynchronised by 0xff": case(b'{"execute":"query-na\xff'),
    "resynchronised by 0xfe": case(b'{"execute":"query-na\xfe', resync=True),
    "resynchronised twice": case(b'{"a\xff[[[\xff'),
    "0xff alone": case(b"\xff"),
    "0xff between": case(b'{"execute":"query-name"}\xff\xff\xff{"execute":"query-name"}'),
    "control characters": case(bytes(range(1, 32)), resync=True),
    "NUL": case(b"\0\0\0"),
    "delete": case(b"\x7f"),
}  # fmt: skip

REQUESTS: Final = {
    "before negotiation": case(b'{"execute":"query-name","id":1}', negotiate=None),
    "unknown before negotiation": case(b'{"execute":"nope"}', negotiate=None),
    "bad JSON before negotiation": case(b"{]", negotiate=None),
    "out of band before negotiation": case(b'{"exec-oob":"query-name"}', negotiate=None),
    "a second negotiation": case(b'{"execute":"qmp_capabilities"}'),
    "an unknown capability": case(b'{"execute":"qmp_capabilities","arguments":{"enable":["fly"]}}', negotiate=None),
    "a capability twice": case(b'{"execute":"qmp_capabilities","arguments":{"enable":["oob","oob"]}}', negotiate=None),
    "enable is no list": case(b'{"execute":"qmp_capabilities","arguments":{"enable":"oob"}}', negotiate=None),
    "unknown command": case(b'{"execute":"nope","id":9}', values=True),
    "no execute": case(b'{"id":1}', values=True),
    "execute and exec-oob": case(b'{"execute":"query-name","exec-oob":"query-name","id":1}', values=True),
    "execute is a number": case(b'{"execute":5,"id":1}', values=True),
    "execute is null": case(b'{"execute":null}'),
    "exec-oob is a number": case(b'{"exec-oob":5}'),
    "arguments is a list": case(b'{"execute":"query-name","arguments":[],"id":1}', values=True),
    "arguments is null": case(b'{"execute":"query-name","arguments":null}'),
    "an extra member": case(b'{"execute":"query-name","bogus":1,"id":1}', values=True),
    "an extra member, and no execute": case(b'{"bogus":1}'),
    "two extra members": case(b'{"execute":"query-name","b":1,"a":2}'),
    "a member twice": case(b'{"execute":"query-name","execute":"query-uuid"}'),
    "an id twice": case(b'{"execute":"query-name","id":1,"id":2}'),
    "id is an object": case(b'{"execute":"query-name","id":{"a":[1]}}', values=True),
    "id is null": case(b'{"execute":"query-name","id":null}', values=True),
    "id is an error's": case(b'{"execute":"nope","id":[null]}', values=True),
    "an extra argument": case(b'{"execute":"query-name","arguments":{"z":1}}'),
    "out of band, not allowed": case(b'{"exec-oob":"device_add","id":1}', values=True),
    "out of band, unknown": case(b'{"exec-oob":"nope","id":1}', values=True),
    "out of band, not negotiated": case(b'{"exec-oob":"device_add","id":1}', negotiate=PLAIN),
    "out of band, allowed here": case(b'{"exec-oob":"query-name","id":1}'),
}  # fmt: skip

COMMANDS: Final = {
    "query-name": case(b'{"execute":"query-name"}', values=True),
    "query-uuid": case(b'{"execute":"query-uuid"}', values=True),
    "query-version": case(b'{"execute":"query-version"}'),
    "query-status": case(b'{"execute":"query-status"}'),
    "query-commands": case(b'{"execute":"query-commands"}'),
    "query-qmp-schema": case(b'{"execute":"query-qmp-schema"}'),
    "getfd without an fd": case(b'{"execute":"getfd","arguments":{"fdname":"a"}}'),
    "getfd without a name": case(b'{"execute":"getfd"}'),
    "getfd, a digit": case((b'{"execute":"getfd","arguments":{"fdname":"1f"}}', 1)),
    "getfd, and again": case(
        (b'{"execute":"getfd","arguments":{"fdname":"a"}}', 1),
        b'{"execute":"getfd","arguments":{"fdname":"b"}}',
    ),
    "getfd and closefd": case(
        (b" ", 1),
        b'{"execute":"getfd","arguments":{"fdname":"a"}}',
        b'{"execute":"closefd","arguments":{"fdname":"a"}}' * 2,
    ),
    "getfd replaces": case(
        *[(b'{"execute":"getfd","arguments":{"fdname":"a"}}', 1)] * 2,
        b'{"execute":"closefd","arguments":{"fdname":"a"}}' * 2,
    ),
    "two fds, two names": case(
        (b" ", 2),
        b'{"execute":"getfd","arguments":{"fdname":"a"}}{"execute":"getfd","arguments":{"fdname":"b"}}',
    ),
    "an fd ahead of another command": case(
        (b'{"execute":"query-name"}', 1),
        b'{"execute":"getfd","arguments":{"fdname":"a"}}',
    ),
    "closefd, unknown": case(b'{"execute":"closefd","arguments":{"fdname":"zz"}}'),
    "add-fd": case(
        (b'{"execute":"add-fd"}', 1),
        b'{"execute":"remove-fd","arguments":{"fdset-id":0}}{"execute":"query-fdsets"}',
        values=False,
    ),
    "add-fd to a new set": case(
        (b'{"execute":"add-fd","arguments":{"fdset-id":7,"opaque":"x"}}', 1),
        b'{"execute":"remove-fd","arguments":{"fdset-id":7}}',
    ),
    "add-fd, negative": case((b'{"execute":"add-fd","arguments":{"fdset-id":-1}}', 1)),
    "add-fd without an fd": case(b'{"execute":"add-fd"}'),
    "remove-fd, unknown set": case(b'{"execute":"remove-fd","arguments":{"fdset-id":9}}'),
    "remove-fd, unknown fd": case(
        (b'{"execute":"add-fd","arguments":{"fdset-id":3}}', 1),
        b'{"execute":"remove-fd","arguments":{"fdset-id":3,"fd":4711}}',
    ),
    "remove-fd without arguments": case(b'{"execute":"remove-fd"}'),
    "a string for an integer": case(b'{"execute":"remove-fd","arguments":{"fdset-id":"9"}}'),
    "a fraction for an integer": case(b'{"execute":"remove-fd","arguments":{"fdset-id":9.5}}'),
    "an integer for a string": case(b'{"execute":"closefd","arguments":{"fdname":5}}'),
    "too large an integer": case(b'{"execute":"remove-fd","arguments":{"fdset-id":9223372036854775808}}'),
    "device_add, unknown driver": case(b'{"execute":"device_add","arguments":{"driver":"nope","id":"a"}}'),
    "device_add, no driver": case(b'{"execute":"device_add","arguments":{"id":"a"}}'),
    "device_add, no arguments": case(b'{"execute":"device_add"}'),
    "device_add, driver is a number": case(b'{"execute":"device_add","arguments":{"driver":5}}'),
    "device_add, a bad id": case(b'{"execute":"device_add","arguments":{"driver":"vfio-pci","id":"1a"}}'),
    "device_del, unknown": case(b'{"execute":"device_del","arguments":{"id":"zz"}}', values=True),
    "device_del, a path": case(b'{"execute":"device_del","arguments":{"id":"/machine/peripheral/zz"}}'),
    "device_del without an id": case(b'{"execute":"device_del"}'),
    "object-add, unknown type": case(b'{"execute":"object-add","arguments":{"qom-type":"nope","id":"a"}}'),
    "object-add without a type": case(b'{"execute":"object-add","arguments":{"id":"a"}}'),
    "object-add without an id": case(b'{"execute":"object-add","arguments":{"qom-type":"memory-backend-fd"}}'),
    "object-del, unknown": case(b'{"execute":"object-del","arguments":{"id":"zz"}}'),
    "query-stats without a target": case(b'{"execute":"query-stats"}'),
    "query-stats, unknown target": case(b'{"execute":"query-stats","arguments":{"target":"moon"}}'),
    "trace-event-get-state": case(b'{"execute":"trace-event-get-state","arguments":{"name":"*"}}'),
    "trace-event-get-state, unknown": case(b'{"execute":"trace-event-get-state","arguments":{"name":"no_such_trace"}}'),
    "trace-event-get-state, no name": case(b'{"execute":"trace-event-get-state"}'),
    "trace-event-set-state, unknown": case(
        b'{"execute":"trace-event-set-state","arguments":{"name":"no_such_trace","enable":true}}',
    ),
    "human-monitor-command": case(b'{"execute":"human-monitor-command","arguments":{"command-line":"help"}}'),
    "human-monitor-command, unknown": case(b'{"execute":"human-monitor-command","arguments":{"command-line":"nope"}}'),
    "device-list-properties, unknown": case(b'{"execute":"device-list-properties","arguments":{"typename":"nope"}}'),
}  # fmt: skip

CASES: Final = FRAMING | REQUESTS | COMMANDS

OTHER_ANSWER: Final = {
    "an overlong utf-8 sequence": "QEMU takes the two-byte form of NUL (modified UTF-8); RFC 3629 forbids it",
    "a huge integer": "QEMU makes a floating-point number of it and echoes another id; ours is echoed exactly",
    "out of band, allowed here": "every query of ours may run out of band; of QEMU's, four migration commands",
    "two fds, two names": "QEMU keeps one fd that waits for its name; ours queue in order of arrival",
}
"""Cases answered differently on purpose, and the reason."""

TIMING: Final = {"getfd replaces"}
"""Cases in which QEMU's answer depends on how its reads fall: two fds may be waiting, and it keeps one."""

OTHER_WORDS: Final = {
    "NUL": "QEMU's text ends at the NUL, as C strings do; ours shows it, escaped",
    "an unknown capability": "QEMU names the parameter 'null'; ours names the element, and says what it takes",
    "two extra members": "QEMU reports the one its hash table has first; ours, the first in the text",
    "too large an integer": "QEMU's integers have 64 bits and a sign; ours are compared with what there is",
    "device_add, driver is a number": "QEMU's device_add is not typed ('gen': false) and finds no string; ours is",
    "device_add, a bad id": "this QEMU has no PCI bus and says so first",
    "object-add, unknown type": "ours adds what it takes",
    "object-add without an id": "this QEMU has no memory-backend-fd and says so first",
    "query-stats, unknown target": "ours adds what it takes",
}
"""Cases refused alike, in other words on purpose, and the reason."""


class Session:
    """One QMP session, by bytes."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(PATIENCE)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("rb")
        self.greeting = json.loads(self._lines.readline())
        self._sentinels = 0

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._socket.close()

    def send(self, data: bytes, fds: int = 0) -> None:
        if not data:
            return
        if fds:
            numbers = [os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC) for _ in range(fds)]
            sent = socket.send_fds(self._socket, [data], numbers)
            for number in numbers:
                os.close(number)
            data = data[sent:]
        self._socket.sendall(data)

    def until_sentinel(self, *, resync: bool) -> list[dict[str, Any]]:
        """Ask for something known; what came before its answer, events left out. Every line has to be framed alike."""
        self._sentinels += 1
        name = f"sentinel {self._sentinels}"
        self.send((b"\xff" if resync else b"") + b'{"execute":"query-uuid","id":"%s"}\n' % name.encode())
        replies: list[dict[str, Any]] = []
        while True:
            line = self._lines.readline()
            assert line, f"the session ended; before that: {replies}"
            assert line.endswith(b"\r\n")
            assert line.isascii(), "output is ASCII"
            reply = json.loads(line)
            if reply.get("id") == name:
                return replies
            if "event" not in reply:
                replies.append(reply)


def run(path: Path, case: Case) -> list[dict[str, Any]]:
    with Session(path) as session:
        if case.negotiate is not None:
            session.send(case.negotiate)
        for chunk in case.chunks:
            data, fds = chunk if isinstance(chunk, tuple) else (chunk, 0)
            session.send(data, fds)
        return session.until_sentinel(resync=case.resync)


CONTROL: Final = re.compile(r"[\x01-\x1f\x7f]")
"""QEMU repeats what it could not read as it came; ours escapes what would drive a terminal. Else the same words."""


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()


def essence(replies: list[dict[str, Any]], *, values: bool) -> list[Any]:
    """What has to agree: success or error, error class and words, id; the value where it is asked for."""
    found: list[Any] = []
    for reply in replies:
        rest = {name: value for name, value in reply.items() if name not in ("return", "error")}
        if "error" in reply:
            error = reply["error"]
            found.append(("error", error["class"], CONTROL.sub(_escaped, error["desc"]), rest))
        else:
            value = reply["return"]
            found.append(("return", value if values else type(value).__name__, rest))
    return found


def without_words(found: list[Any]) -> list[Any]:
    return [(kind, what, rest[-1]) for kind, what, *rest in found]


@pytest.mark.parametrize("name", CASES)
def test_the_same_answers(steady_server: OwnServer, qemu: Path, name: str) -> None:
    case = CASES[name]
    theirs = essence(run(qemu, case), values=case.values)
    ours = essence(run(steady_server.path, case), values=case.values)
    if name in TIMING:
        assert [kind for kind, *_ in ours] == ["return"] * (len(ours) - 1) + ["error"]
    elif name in OTHER_ANSWER:
        assert without_words(ours) != without_words(theirs), f"no difference any more: {OTHER_ANSWER[name]}"
    elif name in OTHER_WORDS:
        assert without_words(ours) == without_words(theirs)
        assert ours != theirs, f"no difference any more: {OTHER_WORDS[name]}"
    else:
        assert ours == theirs


def test_the_tables_are_about_cases() -> None:
    assert set(OTHER_ANSWER) | set(OTHER_WORDS) <= set(CASES)
    assert not set(OTHER_ANSWER) & set(OTHER_WORDS)


def test_greetings(steady_server: OwnServer, qemu: Path) -> None:
    def shape(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: shape(item) for name, item in value.items()}
        return value if isinstance(value, list) else type(value).__name__

    with Session(qemu) as theirs, Session(steady_server.path) as ours:
        assert shape(ours.greeting) == shape(theirs.greeting)


TEMPLATES: Final = (
    b'{"execute":"query-name","id":1}',
    b'{"execute":"query-uuid","arguments":{}, "id":{"a":[1,2,"x"]}}',
    b"{'execute':'closefd','arguments':{'fdname':'none'},'id':'q'}",
    b'{"execute":"remove-fd","arguments":{"fdset-id":4},"id":[]}',
    b'{"exec-oob":"device_add","id":-1.5e3}',
    b'{"execute":"device_del","arguments":{"id":"nobody"}}',
)
BYTES: Final = b"{}[]:,\"'\\ \n\t01-.eE+tfnu/x"  # none of these can make an intended difference of another input


def mutations(count: int, seed: int) -> list[bytes]:
    """Requests with a few bytes changed, dropped, doubled or cut off. The same ones in every run."""
    chance = random.Random(seed)
    made = []
    for _ in range(count):
        text = bytearray(b"".join(chance.choice(TEMPLATES) for _ in range(chance.randint(1, 2))))
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(max(len(text), 1))
            match chance.randrange(5):
                case 0:
                    text[at : at + 1] = bytes([chance.choice(BYTES)])
                case 1:
                    del text[at : at + 1]
                case 2:
                    text[at:at] = bytes([chance.choice(BYTES)])
                case 3:
                    text[at:at] = text[at : at + chance.randint(1, 12)]
                case _:
                    del text[at + 1 :]
        made.append(bytes(text))
    return made


def alike(found: list[Any]) -> list[Any]:
    """Without two small things: of several unexpected members each reports another, and ours shortens a long token."""
    pattern = re.compile(r"member '.*' is unexpected|stray '.*'", re.DOTALL)
    return [tuple(pattern.sub("...", part) if isinstance(part, str) else part for part in one) for one in found]


@pytest.mark.parametrize("seed", range(8))
def test_mutated_requests(steady_server: OwnServer, qemu: Path, seed: int) -> None:
    """One long session of each, hundreds of damaged requests: they never lose step with each other."""
    with Session(qemu) as theirs, Session(steady_server.path) as ours:
        theirs.send(PLAIN)  # without out-of-band replies, which may come in any order
        ours.send(PLAIN)
        for text in mutations(150, seed):
            theirs.send(text)
            ours.send(text)
            expected = alike(essence(theirs.until_sentinel(resync=True), values=True))
            assert alike(essence(ours.until_sentinel(resync=True), values=True)) == expected, text


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_any_pieces(steady_server: OwnServer, qemu: Path, size: int) -> None:
    """Everything at once, cut into pieces anywhere: the pieces make no difference."""
    names = [name for name, case in FRAMING.items() if not case.resync and name not in OTHER_ANSWER | OTHER_WORDS]
    text = b"\n\xff".join(chunk for name in names for chunk in FRAMING[name].chunks if isinstance(chunk, bytes))
    with Session(qemu) as theirs, Session(steady_server.path) as ours:
        theirs.send(NEGOTIATE + text)
        ours.send(NEGOTIATE)
        for start in range(0, len(text), size):
            ours.send(text[start : start + size])
        expected = essence(theirs.until_sentinel(resync=True), values=True)
        assert essence(ours.until_sentinel(resync=True), values=True) == expected
