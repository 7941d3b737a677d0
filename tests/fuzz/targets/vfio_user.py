"""What is fuzzed of vfio-user, as functions of bytes: a server's end, a client's end, and the framer against itself.

The input is a script: first byte: whose end; then records of a control byte (how many bytes follow, how many fds come
with them) and their bytes. So a mutation changes what is said, how it is cut, and which fds come when.

Real conversations (``corpus/vfio_user/*.txt``) become such scripts: :func:`corpus`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from tests.fuzz.target import CORPUS, Target, lines

from vfiod.protocol import vfio
from vfiod.protocol import vfio_user as vu
from vfiod.protocol.fd import FileDescriptor, close_all
from vfiod.protocol.limits import VFIO_USER_MAX_FDS, VFIO_USER_MAX_MESSAGE
from vfiod.protocol.vfio_user import Broken, Channel, Command, Failure, Header, Message, Rejected, Reply, Request

__all__ = ["TARGETS", "records", "script"]

CONVERSATIONS = CORPUS / "vfio_user"

SERVER, CLIENT, SHAKEN, FRAMER = range(4)
_HEADER = 4  # of a record: length (3 bytes), fds


def script(whose: int, parts: list[tuple[bytes, int]]) -> bytes:
    """Bytes and fds as one input."""
    out = bytearray([whose])
    for data, fds in parts:
        out += len(data).to_bytes(3, "little") + bytes([fds]) + data
    return bytes(out)


def records(data: bytes) -> Iterator[tuple[bytes, int]]:
    """What a script says."""
    at = 1
    while at + _HEADER <= len(data):
        length = int.from_bytes(data[at : at + 3], "little")
        fds = data[at + 3] % (VFIO_USER_MAX_FDS + 3)
        yield data[at + _HEADER : at + _HEADER + length], fds
        at += _HEADER + length


def corpus() -> list[bytes]:
    """Every conversation, as the server heard it and as the client did; and every message of it alone."""
    out: list[bytes] = []
    for path in sorted(CONVERSATIONS.glob("*.txt")):
        sides: dict[str, list[tuple[bytes, int]]] = {">": [], "<": []}
        for line in path.read_text().splitlines():
            if line and not line.startswith("#"):
                way, fds, text = line.split()
                sides[way].append((bytes.fromhex(text), int(fds)))
        out += [script(SERVER, sides[">"]), script(CLIENT, sides["<"]), script(FRAMER, sides[">"])]
        out += [script(SHAKEN, [part]) for part in sides[">"]]
        out += [script(CLIENT, [part]) for part in sides["<"]]
    return out + lines("vfio-user")


def _target(data: bytes) -> None:
    """Feed one input. Raises AssertionError when something is wrong."""
    if not data:
        return
    given: list[FileDescriptor] = []
    try:
        _ENDS[data[0] % 4](data, given)
        assert all(fd.closed for fd in given), "an fd was forgotten"
    finally:
        close_all(given)


def _fds(count: int, given: list[FileDescriptor]) -> list[FileDescriptor]:
    fds = [FileDescriptor(os.dup(0)) for _ in range(count)]
    given.extend(fds)
    return fds


def _server(data: bytes, given: list[FileDescriptor]) -> None:
    _serve(Channel.server(), data, given)


def _shaken(data: bytes, given: list[FileDescriptor]) -> None:
    channel = Channel.server()
    [first] = channel.receive(Header(0, Command.VERSION, 20).pack() + bytes(4))
    assert isinstance(first, Request)
    _serve(channel, data, given)


def _serve(channel: Channel, data: bytes, given: list[FileDescriptor]) -> None:
    channel.request(vu.DmaRead(0, 4))
    channel.request(vu.DmaWrite(0, b"abcd"))
    ended = False
    for part, fds in records(data):
        for happening in channel.receive(part, _fds(fds, given)):
            assert not ended, "something came after the end"
            if isinstance(happening, Request):
                _answered(channel, happening)
            elif isinstance(happening, Rejected | Broken):
                _is_refusal(happening.outgoing)
                ended = isinstance(happening, Broken)
            elif isinstance(happening, Reply):
                happening.close()
    channel.close()


def _answered(channel: Channel, request: Request) -> None:
    payload = request.payload
    if isinstance(payload, vu.Version):
        try:
            reply, agreement = vu.answer(payload, room=request.header.size - 16)
        except vu.BadMessage:
            channel.refuse(request, "EINVAL")
        else:
            channel.wire = agreement.wire
            assert reply.minor <= payload.minor
            assert len(vu.Version.pack(reply)) <= max(request.header.size - 16, 45)
    elif isinstance(payload, vu.SetIrqs):
        try:
            whole = payload.with_fds([fd.number for fd in request.fds])
        except vu.BadMessage as error:
            _is_refusal(channel.refuse(request, error.errno))
        else:
            whole.pack()
    else:
        # A body that was taken says the same when it is said again.
        said = payload.pack(channel.wire)
        assert type(payload).unpack(said, channel.wire).pack(channel.wire) == said
    out = channel.reply(request)
    assert (out is None) is request.no_reply
    request.close()


def _is_refusal(out: vu.Outgoing | None) -> None:
    if out is not None:
        header = Header.unpack(out.data)
        assert len(out.data) == 16
        assert header.is_reply
        assert header.is_error
        assert header.error


_ASKED: tuple[tuple[vu.Payload, Command | None], ...] = (
    (vu.Version(capabilities=vu.OURS), None),
    (vu.DmaMap(0, 4096), None),
    (vu.GetDeviceInfo(), None),
    *((vu.GetRegionInfo(index, 4096), None) for index in range(10)),
    *((vu.GetIrqInfo(index), None) for index in range(5)),
    (vu.GetRegionIoFds(0, 4096), None),
    (vu.RegionRead(0, 0, 64), None),
    (vu.RegionWrite(0, 0, b"abcd"), None),
    (vu.WriteMulti((vu.OneWrite(0, 0, b"a"),)), None),
    (vu.DeviceFeature(1, vfio.FeatureFlags.GET), None),
    (vu.MigrationRead(64), None),
    (vu.MigrationWrite(b"abc"), None),
    (vu.Nothing(), Command.DEVICE_RESET),
)


def _client(data: bytes, given: list[FileDescriptor]) -> None:
    channel = Channel.client()
    waiting = {channel.request(payload, command=command)[0] for payload, command in _ASKED}
    for part, fds in records(data):
        for happening in channel.receive(part, _fds(fds, given)):
            if isinstance(happening, Reply | Failure):
                assert happening.id in waiting, "a reply came twice"
                waiting.discard(happening.id)
            if isinstance(happening, Reply | Request):
                happening.close()
            if isinstance(happening, Rejected | Broken):
                _is_refusal(happening.outgoing)
    assert set(channel.waiting()) == waiting
    channel.close()


def _framer(data: bytes, given: list[FileDescriptor]) -> None:
    """The same messages, however the stream is cut."""
    parts = [part for part, _ in records(data)]
    whole = _framed(parts)
    assert whole == _framed([b"".join(parts)])
    if sum(map(len, parts)) <= 2000:
        assert whole == _framed([bytes([byte]) for byte in b"".join(parts)])


def _framed(parts: list[bytes]) -> list[tuple[int, bytes | None]]:
    framer = vu.Framer()
    out: list[tuple[int, bytes | None]] = []
    for part in parts:
        for one in framer.receive_data(part):
            out.append((one.header.id, one.body) if isinstance(one, Message) else (-1, None))
        assert framer.pending <= VFIO_USER_MAX_MESSAGE + len(part)
    return out


_ENDS: tuple[Callable[[bytes, list[FileDescriptor]], None], ...] = (_server, _client, _shaken, _framer)

TARGETS = (
    Target(
        "vfio-user",
        _target,
        corpus,
        ("vfiod.protocol.vfio_user",),
        "either end takes, refuses or ends; every fd is closed; however it is cut, a stream says the same",
        250,
    ),
)
