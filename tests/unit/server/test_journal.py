"""Entries of the journal, read as systemd's "Native Journal Protocol" says; the peer is a real socket."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from vfiod.protocol.catalogue import EVENTS
from vfiod.protocol.catalogue.devices import DeviceError
from vfiod.protocol.limits import MAX_LOG_FIELD
from vfiod.server import logs
from vfiod.server.journal import (
    LOUD,
    NAMESPACE,
    QUIET,
    Journal,
    JsonLines,
    PrefixedLines,
    StructuredHandler,
    event_level,
    message_id,
)

PATIENCE = 120


def entry(data: bytes) -> dict[str, str]:
    """An entry as journald takes it apart; a byte out of place is an error."""
    fields: dict[str, str] = {}
    while data:
        line, newline, rest = data.partition(b"\n")
        assert newline, "the last field must end in a newline"
        key, equals, value = line.partition(b"=")
        if not equals:
            length = int.from_bytes(rest[:8], "little")
            value, rest = rest[8 : 8 + length], rest[8 + length :]
            assert rest[:1] == b"\n"
            rest = rest[1:]
        name = key.decode("ascii")
        assert name.replace("_", "A").isalnum()
        assert name.isupper()
        assert not name.startswith("_")
        assert len(name) <= 64
        assert name not in fields
        fields[name] = value.decode()
        data = rest
    return fields


@pytest.fixture
def journald(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.settimeout(PATIENCE)
        made.bind(str(tmp_path / "socket"))
        yield made


@pytest.fixture
def journal(journald: socket.socket) -> Iterator[Journal]:
    made = Journal("vm 1", journald.getsockname())
    yield made
    made.close()


@pytest.fixture
def log() -> Iterator[logging.Logger]:
    made = logging.getLogger("test-of-journal")
    made.propagate = False
    made.setLevel(logging.DEBUG)
    yield made
    made.handlers.clear()


def test_a_message_has_its_fields(journald: socket.socket, journal: Journal, log: logging.Logger) -> None:
    log.addHandler(StructuredHandler(journal))
    log.warning("Device %s is odd", "nic0", extra=logs.about(device="nic0", count=3, ok=True))
    assert entry(journald.recv(65536)) == {
        "SYSLOG_IDENTIFIER": "vfiod",
        "VFIOD_VM": "vm 1",
        "MESSAGE": "Device nic0 is odd",
        "PRIORITY": "4",
        "LOGGER": "test-of-journal",
        "VFIOD_DEVICE": "nic0",
        "VFIOD_COUNT": "3",
        "VFIOD_OK": "true",
    }


def test_an_exception_and_lines_are_kept_whole(journald: socket.socket, journal: Journal, log: logging.Logger) -> None:
    log.addHandler(StructuredHandler(journal))
    try:
        raise ValueError("two\nlines")
    except ValueError:
        log.exception("It failed\nbadly")
    found = entry(journald.recv(65536))
    assert found["MESSAGE"] == "It failed\nbadly"
    assert found["PRIORITY"] == "3"
    assert found["VFIOD_TRACEBACK"].endswith("ValueError: two\nlines\n")
    assert found["CODE_FILE"] == __file__
    assert found["CODE_FUNC"] == "test_an_exception_and_lines_are_kept_whole"


@pytest.mark.parametrize(("level", "priority"), [(10, "7"), (20, "6"), (30, "4"), (40, "3"), (50, "2"), (35, "5")])
def test_priorities(journald: socket.socket, journal: Journal, log: logging.Logger, level: int, priority: str) -> None:
    log.addHandler(StructuredHandler(journal))
    log.log(level, "x")
    assert entry(journald.recv(65536))["PRIORITY"] == priority


def test_nobody_can_add_fields_by_what_they_say(journald: socket.socket, journal: Journal) -> None:
    journal.send("a\nPRIORITY=0\nb", 6, {"device": "x\n_UID=0", "odd key=": "v", "bytes": "\udcff"})
    found = entry(journald.recv(65536))
    assert found["PRIORITY"] == "6"
    assert found["VFIOD_DEVICE"] == "x\n_UID=0"
    assert found["VFIOD_ODD_KEY_"] == "v"
    assert "_UID" not in found


def test_long_fields_are_cut(journald: socket.socket, journal: Journal) -> None:
    journal.send("m" * 1_000_000, 6, {"device": "d" * 1_000_000})
    found = entry(journald.recv(1 << 20))
    assert len(found["MESSAGE"]) == len(found["VFIOD_DEVICE"]) == MAX_LOG_FIELD


def test_a_journal_that_does_not_read_is_not_waited_for_and_is_told(journald: socket.socket, journal: Journal) -> None:
    sent = 0
    while not journal.lost:
        journal.send("x", 6, {})
        sent += 1
    journal.send("x", 6, {})
    assert journal.lost == 2
    for _ in range(sent - 1):
        assert "VFIOD_LOST" not in entry(journald.recv(65536))
    journal.send("y", 6, {})
    assert entry(journald.recv(65536))["VFIOD_LOST"] == "2"
    journal.send("z", 6, {})
    assert "VFIOD_LOST" not in entry(journald.recv(65536))


def test_a_journal_that_is_gone_stops_nothing(journald: socket.socket, journal: Journal) -> None:
    journald.close()
    journal.send("x", 6, {})
    assert journal.lost == 1


def test_an_event_is_an_entry(journald: socket.socket, journal: Journal) -> None:
    journal.event(7, EVENTS["DEVICE_ERROR"], DeviceError(device="nic0", reason="the peer died"))
    found = entry(journald.recv(65536))
    assert found["MESSAGE"] == "DEVICE_ERROR device=nic0 reason=the peer died"
    assert found["PRIORITY"] == "3"
    assert found["MESSAGE_ID"] == message_id("DEVICE_ERROR")
    assert (found["VFIOD_EVENT"], found["VFIOD_SEQ"], found["VFIOD_DEVICE"]) == ("DEVICE_ERROR", "7", "nic0")


def test_ids_of_messages_are_name_based_uuids() -> None:
    space = uuid.UUID(bytes=NAMESPACE)
    for name in [*EVENTS, "AUDIT"]:
        assert message_id(name) == uuid.uuid5(space, name).hex


def test_every_event_has_its_level() -> None:
    assert set(EVENTS) >= set(LOUD) | QUIET
    assert event_level("DEVICE_ADDED") == logging.INFO
    assert event_level("IRQ") == logging.DEBUG
    assert event_level("DEVICE_UNPLUG_ERROR") == logging.WARNING


def test_lines_of_json(log: logging.Logger) -> None:
    reading, writing = os.pipe()
    try:
        log.addHandler(JsonLines("vm1", writing))
        log.info("Two\nlines", extra=logs.about(device="nic0", path=Path("/x")))
        try:
            raise ValueError("why")
        except ValueError:
            log.exception("Failed")
        first, second = map(json.loads, os.read(reading, 65536).splitlines())
    finally:
        os.close(reading)
        os.close(writing)
    assert isinstance(first.pop("time"), float)
    assert first == {
        "level": "info", "logger": "test-of-journal", "vm": "vm1", "message": "Two\nlines", "device": "nic0",
        "path": "/x",
    }  # fmt: skip
    assert second["traceback"].endswith("ValueError: why\n")


def test_prefixed_lines() -> None:
    record = logging.LogRecord("vfiod", logging.ERROR, "", 0, "a\nb", (), None)
    assert PrefixedLines().format(record) == "<3>vfiod a\n<3>b"


def test_whether_stderr_is_the_journal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    assert not logs.is_journal()
    with open(__file__) as file:
        found = os.fstat(file.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
        assert logs.is_journal(file.fileno())
        assert not logs.is_journal(sys.__stdin__.fileno() if sys.__stdin__ else 0)
        number = os.dup(file.fileno())
    os.close(number)
    assert not logs.is_journal(number)
    monkeypatch.setenv("JOURNAL_STREAM", "nonsense")
    assert not logs.is_journal()
