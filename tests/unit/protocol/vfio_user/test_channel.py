"""Both ends of a socket: who may ask what, which reply belongs to which request, what ends a connection."""

from __future__ import annotations

import errno
import os
import struct

import pytest

from vfiod.protocol import vfio
from vfiod.protocol import vfio_user as vu
from vfiod.protocol.fd import FileDescriptor
from vfiod.protocol.limits import VFIO_USER_MAX_PENDING
from vfiod.protocol.vfio_user import Broken, Channel, Command, Failure, Happening, Header, Rejected, Reply, Request


def shaken() -> tuple[Channel, Channel]:
    """A client's and a server's, after the handshake."""
    client, server = Channel.client(), Channel.server()
    _, out = client.request(vu.Version(capabilities=vu.OURS))
    [asked] = server.receive(out.data)
    assert isinstance(asked, Request)
    assert isinstance(asked.payload, vu.Version)
    reply, agreement = vu.answer(asked.payload, room=len(out.data) - 16)
    server.wire = agreement.wire
    sent = server.reply(asked, reply)
    assert sent is not None
    [told] = client.receive(sent.data)
    assert isinstance(told, Reply)
    return client, server


def only(happenings: list[Happening]) -> Happening:
    [one] = happenings
    return one


def refusal(outgoing: vu.Outgoing | None) -> tuple[int, int]:
    """(id, errno) of an error reply, which is a header alone."""
    assert outgoing is not None
    assert len(outgoing.data) == 16
    header = Header.unpack(outgoing.data)
    assert header.is_reply
    assert header.is_error
    return header.id, header.error


def test_a_request_and_its_reply_find_each_other() -> None:
    client, server = shaken()
    first, out1 = client.request(vu.RegionRead(0, 4, 4))
    second, out2 = client.request(vu.GetIrqInfo(1))
    asked = server.receive(out1.data + out2.data)
    assert [one.command for one in asked if isinstance(one, Request)] == [9, 7]
    assert isinstance(asked[0], Request)
    assert isinstance(asked[1], Request)
    late = server.reply(asked[0], vu.RegionData(0, 4, b"abcd"))
    early = server.reply(asked[1], vu.IrqInfoReply(vfio.IrqInfo(1)))
    assert late is not None
    assert early is not None
    replies = client.receive(early.data + late.data)
    assert [one.id for one in replies if isinstance(one, Reply)] == [second, first]
    assert client.waiting() == ()


def test_an_error_is_a_header_with_an_errno() -> None:
    client, server = shaken()
    id, out = client.request(vu.Nothing(), command=Command.DEVICE_RESET)
    asked = only(server.receive(out.data))
    assert isinstance(asked, Request)
    sent = server.refuse(asked, "ENOTTY")
    assert refusal(sent) == (id, errno.ENOTTY)
    assert sent is not None
    told = only(client.receive(sent.data))
    assert isinstance(told, Failure)
    assert (told.id, told.command, told.errno) == (id, Command.DEVICE_RESET, "ENOTTY")
    _, out = client.request(vu.GetIrqInfo(1))
    without = Header(Header.unpack(out.data).id, Command.DEVICE_GET_IRQ_INFO, 16, 0x21, 0)
    told = only(client.receive(without.pack()))
    assert isinstance(told, Failure)
    assert told.errno == "EIO"  # ERROR without a number


def test_what_wants_no_reply_gets_none_not_even_an_error() -> None:
    client, server = shaken()
    _, out = client.request(vu.RegionWrite(0, 0, b"x"), no_reply=True)
    assert client.waiting() == ()
    asked = only(server.receive(out.data))
    assert isinstance(asked, Request)
    assert asked.no_reply
    assert server.reply(asked, vu.RegionWritten(0, 0, 1)) is None
    assert server.refuse(asked, "EIO") is None
    told = only(server.receive(Header(1, 99, 16, 0x10).pack()))
    assert isinstance(told, Rejected)
    assert told.outgoing is None


def test_the_servers_requests_on_the_same_socket_and_on_a_twin() -> None:
    client, server = shaken()
    id, out = server.request(vu.DmaRead(0x1000, 4))
    asked = only(client.receive(out.data))
    assert isinstance(asked, Request)
    sent = client.reply(asked, vu.DmaData(0x1000, b"abcd"))
    assert sent is not None
    told = only(server.receive(sent.data))
    assert isinstance(told, Reply)
    assert (told.id, told.payload) == (id, vu.DmaData(0x1000, b"abcd"))
    twin = client.twin()
    client.accept_nothing()
    _, out = server.request(vu.DmaWrite(0x1000, b"x"))
    assert isinstance(only(client.receive(out.data)), Rejected)
    assert isinstance(only(twin.receive(out.data)), Request)


@pytest.mark.parametrize(
    ("header", "number"),
    [
        (Header(7, 99, 16), errno.ENOSYS),
        (Header(7, 14, 16), errno.ENOSYS),
        (Header(7, Command.DMA_READ, 16), errno.ENOSYS),  # not of a server
        (Header(7, Command.VERSION, 16), errno.EINVAL),  # again
        (Header(7, Command.DEVICE_GET_INFO, 16), errno.EINVAL),  # cut short
    ],
)
def test_what_cannot_be_obeyed_is_refused_and_the_stream_goes_on(header: Header, number: int) -> None:
    client, server = shaken()
    told = only(server.receive(header.pack()))
    assert isinstance(told, Rejected)
    assert refusal(told.outgoing) == (7, number)
    _, out = client.request(vu.GetDeviceInfo())
    assert isinstance(only(server.receive(out.data)), Request)


def test_fds_that_nothing_asks_for_are_refused_and_closed() -> None:
    client, server = shaken()
    fds = [FileDescriptor(os.eventfd(0)) for _ in range(2)]
    _, out = client.request(vu.DmaMap(0, 4096))
    told = only(server.receive(out.data, fds))
    assert isinstance(told, Rejected)
    assert "came with 2 fds, it takes 1" in told.desc
    assert all(fd.closed for fd in fds)
    one = FileDescriptor(os.eventfd(0))
    _, out = client.request(vu.GetDeviceInfo())
    told = only(server.receive(out.data, [one]))
    assert isinstance(told, Rejected)
    assert one.closed


@pytest.mark.parametrize(
    "first",
    [
        Header(1, Command.DEVICE_GET_INFO, 16).pack(),
        Header(1, Command.VERSION, 16).pack(),
        Header(1, Command.VERSION, 18).pack() + b"\0\0",
        Header(1, 99, 16).pack(),
        Header(1, Command.VERSION, 21).pack() + b"\0\0\0\0x",
    ],
)
def test_without_a_handshake_there_is_no_connection(first: bytes) -> None:
    server = Channel.server()
    told = only(server.receive(first))
    assert isinstance(told, Broken)
    assert refusal(told.outgoing)[0] == 1
    good = Header(2, Command.VERSION, 20).pack() + bytes(4)
    assert server.receive(good) == []


def test_a_reply_before_the_handshake_is_no_request() -> None:
    assert isinstance(only(Channel.server().receive(Header(1, 1, 16, 1).pack())), Rejected)


def test_replies_that_make_no_sense_fail_their_request() -> None:
    client, _ = shaken()
    cases = [
        (Command.REGION_WRITE, b""),  # the reply to something else
        (Command.REGION_READ, b"\0" * 15),  # cut short
        (Command.REGION_READ, struct.pack("=QII", 0, 0, 100) + b"abc"),  # less than it says
        (Command.REGION_READ, struct.pack("=QII", 0, 0, 0xFFFF_FFFF)),  # more than agreed on
    ]
    for command, body in cases:
        id, _ = client.request(vu.RegionRead(0, 0, 4))
        told = only(client.receive(Header(id, command, 16 + len(body), 1).pack() + body))
        assert isinstance(told, Failure)
        assert (told.id, told.errno) == (id, "EPROTO")
    fd = FileDescriptor(os.eventfd(0))
    id, _ = client.request(vu.RegionRead(0, 0, 4))
    body = struct.pack("=QII", 0, 0, 0)
    told = only(client.receive(Header(id, Command.REGION_READ, 32, 1).pack() + body, [fd]))
    assert isinstance(told, Failure)
    assert fd.closed


def test_a_reply_nobody_asked_for_and_one_nobody_waits_for() -> None:
    client, server = shaken()
    told = only(client.receive(Header(4000, Command.REGION_READ, 16, 1).pack()))
    assert isinstance(told, Rejected)
    assert told.outgoing is None
    id, out = client.request(vu.GetDeviceInfo())
    client.forget(id)
    asked = only(server.receive(out.data))
    assert isinstance(asked, Request)
    sent = server.reply(asked, vu.DeviceInfoReply(vfio.DeviceInfo()))
    assert sent is not None
    fd = FileDescriptor(os.eventfd(0))
    assert client.receive(sent.data, [fd]) == []
    assert fd.closed
    assert isinstance(only(client.receive(sent.data)), Rejected)  # once


def test_ids_are_not_reused_while_they_are_waited_for() -> None:
    client, _ = shaken()
    ids = {client.request(vu.GetDeviceInfo())[0] for _ in range(VFIO_USER_MAX_PENDING)}
    assert len(ids) == VFIO_USER_MAX_PENDING
    with pytest.raises(vu.BadMessage, match="wait for replies") as caught:
        client.request(vu.GetDeviceInfo())
    assert caught.value.errno == "ENOBUFS"


def test_a_stream_out_of_step_ends_with_an_answer_when_there_can_be_one() -> None:
    _, server = shaken()
    told = only(server.receive(Header(9, Command.REGION_WRITE, 0x7FFF_FFFF).pack()))
    assert isinstance(told, Broken)
    assert refusal(told.outgoing) == (9, errno.E2BIG)
    client, _ = shaken()
    told = only(client.receive(Header(9, Command.REGION_WRITE, 3, 1).pack()))
    assert isinstance(told, Broken)
    assert told.outgoing is None


def test_nothing_comes_after_the_end_not_even_from_the_same_read() -> None:
    server = Channel.server()
    fd = FileDescriptor(os.eventfd(0))
    stream = Header(1, Command.DEVICE_GET_INFO, 16).pack() + Header(2, Command.VERSION, 20).pack() + bytes(4)
    assert isinstance(only(server.receive(stream, [fd])), Broken)  # found by the fuzzer
    assert fd.closed
