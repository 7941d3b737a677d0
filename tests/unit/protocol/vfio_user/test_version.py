"""The handshake, with what QEMU and libvfio-user say in it."""

from __future__ import annotations

import struct

import pytest

from vfiod.protocol import vfio_user as vu
from vfiod.protocol.vfio_user import Capabilities, CountWidth, TwinSocket, Version

QEMU = (
    b'{"capabilities": {"migration": {"max_bitmap_size": 268435456, "pgsize": 4096}, "write_multiple": true, '
    b'"max_msg_fds": 16, "max_data_xfer_size": 1048576, "pgsizes": 4096, "max_dma_maps": 65535}}\0'
)
"""What QEMU 10.1 sends (``hw/vfio-user/proxy.c``, ``caps_json``)."""


def version(text: bytes, major: int = 0, minor: int = 0) -> Version:
    return Version.unpack(struct.pack("=HH", major, minor) + text)


def test_qemu_is_answered_in_what_it_takes() -> None:
    proposed = version(QEMU)
    room = 4 + len(QEMU)
    reply, agreement = vu.answer(proposed, room=room)
    assert len(reply.pack()) <= room
    assert reply.minor == 0
    assert reply.told == Capabilities(
        max_msg_fds=16, max_data_xfer_size=1048576, max_dma_maps=65535, pgsizes=4096, write_multiple=True
    )
    assert agreement.wire.count is CountWidth.U32
    assert (agreement.send_fds, agreement.multi, agreement.page_size) == (16, True, 4096)


def test_a_reply_says_nothing_that_was_not_proposed() -> None:
    reply, agreement = vu.answer(version(b'{"capabilities":{"max_msg_fds":8}}\0', minor=1), room=200)
    assert reply.pack()[4:] == b'{"capabilities":{"max_msg_fds":16}}\0'
    assert agreement.wire == vu.Wire()
    assert (agreement.send_fds, agreement.multi, agreement.twin) == (8, False, False)
    bare, agreement = vu.answer(Version.unpack(struct.pack("=HH", 0, 7)), room=4)
    assert bare.pack() == struct.pack("=HH", 0, 1)
    assert agreement.send_fds == 1  # the default


def test_a_reply_finds_room_by_leaving_defaults_out() -> None:
    text = b'{"capabilities":{"max_msg_fds":9,"max_data_xfer_size":4194304,"max_dma_maps":99999,"pgsizes":4096}}\0'
    proposed = version(text)
    reply, _ = vu.answer(proposed, room=len(text) // 2)
    assert reply.pack()[4:] == b'{"capabilities":{"max_msg_fds":16}}\0'


def test_limits_are_the_smaller_of_both() -> None:
    text = b'{"capabilities":{"max_msg_fds":200,"max_data_xfer_size":4096,"max_dma_maps":5,"pgsizes":12288}}\0'
    reply, agreement = vu.answer(version(text), room=500)
    assert reply.told == Capabilities(max_msg_fds=16, max_data_xfer_size=4096, max_dma_maps=5, pgsizes=4096)
    assert (agreement.wire.max_transfer, agreement.dma_maps, agreement.send_fds) == (4096, 5, 200)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "4 bytes"),
        (b"\0\0\0", "4 bytes"),
        (b"\0\0\0\0{}", "NUL"),
        (b"\0\0\0\0{\0", "cannot be read"),
        (b"\0\0\0\0[]\0", "cannot be read"),
        (b'\0\0\0\0{"capabilities":3}\0', "cannot be read"),
        (b'\0\0\0\0{"capabilities":{"max_msg_fds":"8"}}\0', "cannot be read"),
        (b'\0\0\0\0{"capabilities":{"max_msg_fds":-1}}\0', "max_msg_fds -1"),
        (b'\0\0\0\0{"capabilities":{"max_msg_fds":18446744073709551615}}\0', "max_msg_fds 18446744073709551615"),
        (b'\0\0\0\0{"capabilities":{"max_data_xfer_size":0}}\0', "nothing could be done"),
        (b'\0\0\0\0{"capabilities":{"pgsizes":0}}\0', "nothing could be done"),
        (b"\0\0\0\0" + b" " * 5000 + b"{}\0", "5003 bytes"),
        (b'\0\0\0\0{"a":' + b"[" * 4000 + b"\0", "cannot be read"),
        (b'\0\0\0\0{"capabilities":{"twin_socket":true}}\0', "cannot be read"),
        (b"\0\0\0\0\xff\xfe\0", "cannot be read"),
    ],
)
def test_a_malformed_handshake_is_refused(body: bytes, words: str) -> None:
    with pytest.raises(vu.BadMessage, match=words):
        Version.unpack(body)


def test_what_a_server_cannot_do_with() -> None:
    with pytest.raises(vu.BadMessage, match=r"proposes 1\.0"):
        vu.answer(Version(1, 0), room=4)
    with pytest.raises(vu.BadMessage, match="No page size in common"):
        vu.answer(version(b'{"capabilities":{"pgsizes":65536}}\0'), room=100)
    with pytest.raises(ValueError, match="twin"):
        vu.answer(Version(), room=100, twin_fd=True)


OURS = Version(capabilities=Capabilities(max_msg_fds=16, twin_socket=TwinSocket(True)))


def test_a_client_takes_what_libvfio_user_answers() -> None:
    reply = version(b'{ "capabilities": { "max_msg_fds": 8, "max_data_xfer_size": 1048576 } }\0', minor=1)
    agreement = vu.agree(OURS, reply)
    assert (agreement.minor, agreement.send_fds, agreement.twin) == (1, 8, False)
    twin = version(b'{"capabilities":{"twin_socket":{"supported":true,"fd_index":0}}}\0')
    assert vu.agree(OURS, twin, fds=1).twin_fd_index == 0


@pytest.mark.parametrize(
    ("reply", "fds", "words"),
    [
        (Version(1, 0), 0, "version 1.0"),
        (Version(0, 2), 0, "minor version 2"),
        (Version(0, 0, Capabilities(write_multiple=True)), 0, "not proposed"),
        (Version(0, 0, Capabilities(pgsizes=65536)), 0, "pages"),
        (Version(0, 0, Capabilities(twin_socket=TwinSocket(True))), 1, "fd none of 1"),
        (Version(0, 0, Capabilities(twin_socket=TwinSocket(True, 1))), 1, "fd 1 of 1"),
        (Version(0, 0, Capabilities(twin_socket=TwinSocket(True, 0))), 0, "fd 0 of 0"),
        (Version(0, 0), 1, "1 fds and no twin_socket"),
    ],
)
def test_a_client_refuses_a_reply_that_breaks_the_rules(reply: Version, fds: int, words: str) -> None:
    with pytest.raises(vu.BadMessage, match=words):
        vu.agree(OURS, reply, fds=fds)
