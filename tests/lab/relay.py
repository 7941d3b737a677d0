"""Files and byte streams between a guest without shared directories and its host, over one console.

The s390x kernel of the lab has neither 9p nor virtio-serial. It has two consoles; the first is
for people, and this is the second, a terminal line that passes bytes both ways. One frame a line,
in text, so that a kernel that shouts in between spoils a frame and not the rest:

    ~file NAME BASE64     the guest appended this to a file of the exchange directory
    ~open NAME            a guest process connected to the Unix socket NAME of that directory
    ~data NAME BASE64     bytes of that stream, either way
    ~close NAME           its end, either way

On the host the files grow in the real exchange directory, as over 9p, and each stream ends in the
Unix socket of the same name in the guest's directory: one of QEMU's character devices.

The guest runs this file by itself (``python3 relay.py``), without the rest of the project: it
starts in half a second where the imports of a usual program would take two.
"""

from __future__ import annotations

import binascii
import contextlib
import os
import selectors
import socket
import sys
import threading
from collections.abc import Iterable
from pathlib import Path

#: What the guest sends of the exchange directory, in this order: ``status`` says that all else was sent.
FILES = ("booted", "output", "reports", "status")
#: Bytes of a file or stream in one frame, before base64.
CHUNK = 2048
#: Seconds between two looks at the files.
INTERVAL = 0.05
#: The Unix socket QEMU connects its second console to, in the guest's directory.
CONSOLE_NAME = "relay"


def frame(kind: str, name: str, data: bytes = b"") -> bytes:
    """Return one frame, with its line end."""
    return f"~{kind} {name} {binascii.b2a_base64(data, newline=False).decode()}\n".encode()


class Frames:
    """Takes the line apart, whatever pieces it comes in; what is no frame is left out."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterable[tuple[str, str, bytes]]:
        """Give the frames that are whole now: kind, name, bytes."""
        *lines, self._rest = (self._rest + data).replace(b"\r", b"").split(b"\n")
        for line in lines:
            words = line.decode("ascii", "replace").split(" ")
            if len(words) == 3 and words[0] in ("~file", "~open", "~data", "~close"):
                try:
                    yield words[0][1:], words[1], binascii.a2b_base64(words[2], strict_mode=bool(words[2]))
                except binascii.Error:
                    continue


class Host:
    """The host's half: a thread, from QEMU's connection to its end."""

    def __init__(self, directory: Path, exchange: Path) -> None:
        self._directory = directory
        self._exchange = exchange
        self._streams: dict[str, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        # Before QEMU starts, so that nothing the guest says is lost.
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(directory / CONSOLE_NAME))
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._run, name="lab-relay", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait until everything a QEMU that ended had said is in the exchange directory."""
        self._thread.join(10)

    def close(self) -> None:
        """Stop, once QEMU has ended or was never there."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes a thread that still waits for QEMU
        self._thread.join(10)
        self._listener.close()

    def _run(self) -> None:
        try:
            console, _ = self._listener.accept()
        except OSError:
            return
        with console:
            frames = Frames()
            self._selector.register(console, selectors.EVENT_READ, None)
            try:
                while True:
                    for key, _ in self._selector.select():
                        if key.data is None:
                            data = console.recv(65536)
                            if not data:
                                return
                            for kind, name, content in frames.feed(data):
                                self._take(console, kind, name, content)
                        elif key.data in self._streams:
                            self._pass_on(console, key.data)
            except OSError:
                return  # QEMU ended
            finally:
                for name in list(self._streams):
                    self._end(name)
                self._selector.close()

    def _take(self, console: socket.socket, kind: str, name: str, content: bytes) -> None:
        if kind == "file" and name in FILES:
            with (self._exchange / name).open("ab") as stream:
                stream.write(content)
        elif kind == "open":
            self._end(name)
            stream_socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                stream_socket.connect(str(self._directory / name))
            except OSError:
                stream_socket.close()
                console.sendall(frame("close", name))
                return
            self._streams[name] = stream_socket
            self._selector.register(stream_socket, selectors.EVENT_READ, name)
        elif kind == "data" and name in self._streams:
            try:
                self._streams[name].sendall(content)
            except OSError:
                self._end(name)
                console.sendall(frame("close", name))
        elif kind == "close":
            self._end(name)

    def _pass_on(self, console: socket.socket, name: str) -> None:
        try:
            data = self._streams[name].recv(CHUNK)
        except OSError:
            data = b""
        if data:
            console.sendall(frame("data", name, data))
        else:
            self._end(name)
            console.sendall(frame("close", name))

    def _end(self, name: str) -> None:
        stream = self._streams.pop(name, None)
        if stream is not None:
            self._selector.unregister(stream)
            stream.close()


class Guest:
    """The guest's half: runs until the file ``status`` was sent."""

    def __init__(self, exchange: Path, streams: Iterable[str], console: str, messages: str) -> None:
        self._exchange = exchange
        self._line = os.open(console, os.O_RDWR | os.O_NOCTTY)
        _set_raw(self._line)
        self._sent = dict.fromkeys(FILES, 0)
        self._connections: dict[str, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._line, selectors.EVENT_READ, ("line", ""))
        for name in streams:
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listener.bind(str(exchange / name))
            listener.listen(1)
            self._selector.register(listener, selectors.EVENT_READ, ("listener", name))
        self._kmsg = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        os.lseek(self._kmsg, 0, os.SEEK_END)
        self._messages = os.open(messages, os.O_WRONLY | os.O_NOCTTY)
        self._selector.register(self._kmsg, selectors.EVENT_READ, ("kmsg", ""))

    def run(self) -> None:
        """Carry everything until the status is there and sent."""
        frames = Frames()
        while True:
            for key, _ in self._selector.select(INTERVAL):
                kind, name = key.data
                if kind == "line":
                    for what, stream, content in frames.feed(os.read(self._line, 65536)):
                        self._take(what, stream, content)
                elif kind == "kmsg":
                    self._copy_message()
                elif kind == "listener":
                    assert isinstance(key.fileobj, socket.socket)
                    connection, _ = key.fileobj.accept()
                    self._end(name)
                    self._connections[name] = connection
                    self._selector.register(connection, selectors.EVENT_READ, ("stream", name))
                    self._send(frame("open", name))
                elif name in self._connections:
                    self._pass_on(name)
            if self._send_files():
                return

    def _send_files(self) -> bool:
        # The order matters: what was written before the status must go before it.
        ended = (self._exchange / "status").exists()
        for name in FILES if ended else FILES[:-1]:
            try:
                with (self._exchange / name).open("rb") as stream:
                    stream.seek(self._sent[name])
                    while data := stream.read(CHUNK):
                        self._sent[name] += len(data)
                        self._send(frame("file", name, data))
            except FileNotFoundError:
                continue
        return ended

    def _send(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._line, data) :]

    def _take(self, kind: str, name: str, content: bytes) -> None:
        if name not in self._connections:
            return
        if kind == "data":
            try:
                self._connections[name].sendall(content)
            except OSError:
                kind = "close"
        if kind == "close":
            self._end(name)

    def _pass_on(self, name: str) -> None:
        try:
            data = self._connections[name].recv(CHUNK)
        except OSError:
            data = b""
        if not data:
            self._end(name)
        self._send(frame("data", name, data) if data else frame("close", name))

    def _end(self, name: str) -> None:
        connection = self._connections.pop(name, None)
        if connection is not None:
            self._selector.unregister(connection)
            connection.close()

    def _copy_message(self) -> None:
        try:
            record = os.read(self._kmsg, 8192)
        except OSError:
            return  # EPIPE: overwritten before it was read; the next read gives what is left
        _, _, text = record.partition(b";")
        os.write(self._messages, text.partition(b"\n")[0] + b"\n")


def _set_raw(line: int) -> None:
    import termios  # only where there is a line

    attributes = termios.tcgetattr(line)
    attributes[0] = attributes[1] = attributes[3] = 0
    attributes[2] = termios.CS8 | termios.CREAD | termios.CLOCAL
    attributes[6][termios.VMIN] = 1
    attributes[6][termios.VTIME] = 0
    termios.tcsetattr(line, termios.TCSANOW, attributes)


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    guest = Guest(here, (here / "streams").read_text().split(), "/dev/ttysclp0", "/dev/sclp_line0")
    try:
        guest.run()
    except OSError as error:
        print(f"relay: {error}", file=sys.stderr)
        raise
