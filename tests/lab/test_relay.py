"""The relay's host half, with this test for its QEMU: frames, files, streams, and a guest that shouts in between."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.lab.guest.pci import wait_until
from tests.lab.relay import CONSOLE_NAME, Frames, Host, frame


class Setting:
    """A relay, and QEMU's ends: the console it said hello on, and a character device called ``terminal``."""

    def __init__(self, directory: Path) -> None:
        self.exchange = directory / "exchange"
        self.exchange.mkdir()
        self.terminal = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.terminal.bind(str(directory / "terminal"))
        self.terminal.listen()
        self.host = Host(directory, self.exchange)
        self.console = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.console.connect(str(directory / CONSOLE_NAME))
        self.frames = Frames()

    def text(self, name: str) -> str:
        path = self.exchange / name
        return path.read_text() if path.exists() else ""

    def told(self) -> tuple[str, str, bytes]:
        while True:
            for one in self.frames.feed(self.console.recv(4096)):
                return one


@pytest.fixture
def setting(tmp_path: Path) -> Iterator[Setting]:
    made = Setting(tmp_path)
    yield made
    made.console.close()
    made.host.close()
    made.terminal.close()


def test_frames_come_in_any_pieces_and_noise_is_left_out() -> None:
    line = (
        b"[ 1.0] Oops: 0004\n"
        + frame("file", "output", b"one")
        + b"~file half\n~file output !!!\n"
        + frame("close", "t")
    )
    for size in (1, 7, len(line)):
        frames = Frames()
        found = [one for at in range(0, len(line), size) for one in frames.feed(line[at : at + size])]
        assert found == [("file", "output", b"one"), ("close", "t", b"")]


def test_files_grow_in_the_exchange_directory_and_no_others(setting: Setting) -> None:
    setting.console.sendall(frame("file", "output", b"one, ") + frame("file", "output", b"two"))
    setting.console.sendall(frame("file", "../stolen", b"x") + frame("file", "status", b"0\n"))
    wait_until(lambda: setting.text("status") == "0\n", "the status")
    assert setting.text("output") == "one, two"
    assert not (setting.exchange.parent / "stolen").exists()


def test_what_qemu_said_before_it_ended_is_there_after_join(setting: Setting) -> None:
    setting.console.sendall(frame("file", "output", b"x" * 100_000) + frame("file", "status", b"3\n"))
    setting.console.close()
    setting.host.join()
    assert (len(setting.text("output")), setting.text("status")) == (100_000, "3\n")


def test_a_stream_passes_both_ways_and_ends_from_either_side(setting: Setting) -> None:
    setting.console.sendall(frame("open", "terminal"))
    peer, _ = setting.terminal.accept()
    with peer:
        setting.console.sendall(frame("data", "terminal", b"\x00\xffkeys\n"))
        assert peer.recv(100) == b"\x00\xffkeys\n"
        peer.sendall(b"screen")
        assert setting.told() == ("data", "terminal", b"screen")
    assert setting.told() == ("close", "terminal", b"")
    setting.console.sendall(frame("open", "terminal"))
    again, _ = setting.terminal.accept()
    with again:
        setting.console.sendall(frame("close", "terminal"))
        assert again.recv(100) == b""


def test_a_stream_that_leads_nowhere_is_closed_at_once(setting: Setting) -> None:
    setting.console.sendall(frame("open", "nosuch"))
    assert setting.told() == ("close", "nosuch", b"")
