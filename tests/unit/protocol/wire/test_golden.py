"""vfiod's splitter and decoder give the answers QEMU gave, word for word."""

from __future__ import annotations

import json

import pytest
from tests.unit.protocol.wire.golden import ANSWERS, Answer

from vfiod.protocol.errors import VfiodError
from vfiod.protocol.wire import qmp
from vfiod.protocol.wire.stream import JsonStream

CASES = [pytest.param(sent, answers, id=repr(sent)[2:50]) for sent, answers in ANSWERS]


def answers_of(stream: JsonStream, data: bytes) -> list[Answer]:
    """What a server with the one command ``query-name`` would answer."""
    answers: list[Answer] = []
    for item in stream.receive_data(data):
        request = qmp.decode_request(item, oob_enabled=False)
        if isinstance(request, qmp.Rejected):
            reply = json.loads(qmp.encode_error(request.error, request.id))
        else:
            reply = json.loads(qmp.encode_return({}, request.id))
            if request.command != "query-name":
                reply["error"] = {"desc": f"The command {request.command} has not been found"}
        desc = reply["error"]["desc"] if "error" in reply else None
        answers.append((desc, json.dumps(reply["id"]) if "id" in reply else None))
    return answers


def comparable(answers: list[Answer]) -> list[Answer]:
    # QEMU ends a stray token at a NUL, as C does.
    return [(None if desc is None else desc.replace("\\x00", ""), id) for desc, id in answers]


def shown(expected: list[Answer]) -> list[Answer]:
    # QEMU sends control characters back as they came; a person's terminal is better served by their names.
    return [(None if desc is None else str(VfiodError(desc)), id) for desc, id in expected]


@pytest.mark.parametrize(("sent", "expected"), CASES)
def test_at_once(sent: bytes, expected: list[Answer]) -> None:
    assert comparable(answers_of(JsonStream(), sent + b"\xff")) == shown(expected)


@pytest.mark.parametrize(("sent", "expected"), CASES)
def test_byte_by_byte(sent: bytes, expected: list[Answer]) -> None:
    stream = JsonStream()
    answers = [answer for byte in sent + b"\xff" for answer in answers_of(stream, bytes([byte]))]
    assert comparable(answers) == shown(expected)


@pytest.mark.parametrize(("sent", "expected"), CASES)
def test_the_next_command_is_answered(sent: bytes, expected: list[Answer]) -> None:
    answers = answers_of(JsonStream(), sent + b'\xff{"execute":"query-name","id":"after"}')
    assert comparable(answers) == [*shown(expected), (None, '"after"')]
