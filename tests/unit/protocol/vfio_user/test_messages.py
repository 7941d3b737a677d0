"""Every body, by its bytes, and what is refused in one."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiod.protocol import vfio
from vfiod.protocol import vfio_user as vu
from vfiod.protocol.vfio_user import CountWidth, Wire

LITTLE = struct.pack("=H", 1) == b"\1\0"
QEMU = Wire(count=CountWidth.U32)
MAX = (1 << 64) - 1


def le(text: str) -> bytes:
    """Bytes as a little-endian host has them; on a big-endian one they are compared by their meaning alone."""
    return bytes.fromhex(text)


LITERAL: list[tuple[Any, str, Wire]] = [
    (
        vu.DmaMap(0x1000, 0x2000, 0x3000, 1),
        "20000000 01000000 0030000000000000 0010000000000000 0020000000000000",
        Wire(),
    ),
    (vu.DmaUnmap(0x1000, 0x2000), "18000000 00000000 0010000000000000 0020000000000000", Wire()),
    (vu.GetDeviceInfo(), "10000000 00000000 00000000 00000000", Wire()),
    (vu.GetRegionInfo(7, 0x100), "00010000 00000000 07000000 00000000 0000000000000000 0000000000000000", Wire()),
    (vu.GetIrqInfo(2), "10000000 00000000 02000000 00000000", Wire()),
    (vu.GetRegionIoFds(1, 96), "60000000 00000000 01000000 00000000", Wire()),
    (
        vu.SetIrqs(2, 3, 2, vfio.IrqAction.TRIGGER, vfio.IrqData.EVENTFD),
        "14000000 24000000 02000000 03000000 02000000",
        Wire(),
    ),
    (
        vu.SetIrqs(0, 0, 2, vfio.IrqAction.MASK, vfio.IrqData.BOOL, (True, False)),
        "16000000 0a000000 00000000 00000000 02000000 0100",
        Wire(),
    ),
    (vu.RegionRead(7, 4, 2), "0400000000000000 07000000 02000000", Wire()),
    (vu.RegionData(7, 4, b"\xaa\xbb"), "0400000000000000 07000000 02000000 aabb", Wire()),
    (vu.RegionWrite(0, 0x20, b"\1\2\3\4"), "2000000000000000 00000000 04000000 01020304", Wire()),
    (vu.RegionWritten(0, 0x20, 4), "2000000000000000 00000000 04000000", Wire()),
    (
        vu.WriteMulti((vu.OneWrite(1, 8, b"\xaa"), vu.OneWrite(2, 16, bytes(range(8))))),
        "0200000000000000 0800000000000000 01000000 01000000 aa00000000000000"
        " 1000000000000000 02000000 08000000 0001020304050607",
        Wire(),
    ),
    (vu.WroteMulti(2), "0200000000000000", Wire()),
    (vu.DmaRead(0x1000, 4), "0010000000000000 0400000000000000", Wire()),
    (vu.DmaData(0x1000, b"\1\2\3\4"), "0010000000000000 0400000000000000 01020304", Wire()),
    (vu.DmaWrite(0x1000, b"\1\2"), "0010000000000000 0200000000000000 0102", Wire()),
    (vu.DmaWritten(0x1000, 2), "0010000000000000 0200000000000000", Wire()),
    # QEMU: the count has 32 bits, data is right behind it, and its structure's padding at the end
    (vu.DmaRead(0x1000, 4), "0010000000000000 04000000 00000000", QEMU),
    (vu.DmaData(0x1000, b"\1\2\3\4"), "0010000000000000 04000000 01020304 00000000", QEMU),
    (vu.DmaWrite(0x1000, b"\1\2"), "0010000000000000 02000000 0102 00000000", QEMU),
    (vu.DmaWritten(0x1000, 2), "0010000000000000 02000000", QEMU),
    (vu.DmaWritten(), "", QEMU),
    (vu.MigrationRead(0x100), "08010000 00010000", Wire()),
    (vu.MigrationData(b"\1\2"), "0a000000 02000000 0102", Wire()),
    (vu.MigrationWrite(b"\1\2"), "0a000000 02000000 0102", Wire()),
]


@pytest.mark.parametrize(("value", "text", "wire"), LITERAL, ids=lambda x: type(x).__name__)
def test_a_body_is_these_bytes(value: Any, text: str, wire: Wire) -> None:
    data = value.pack(wire)
    if LITTLE:
        assert data == le(text)
    assert len(data) == len(le(text))
    assert type(value).unpack(data, wire) == type(value).unpack(value.pack(wire), wire)
    if not isinstance(value, vu.MigrationRead):
        assert type(value).unpack(data, wire) == value


@pytest.mark.parametrize(("value", "text", "wire"), LITERAL, ids=lambda x: type(x).__name__)
def test_a_body_cut_short_is_refused(value: Any, text: str, wire: Wire) -> None:
    data = value.pack(wire)
    for length in range(len(data)):
        if isinstance(value, vu.DmaWritten) and (not length or length >= 12):
            continue  # nothing, and a count of 4 bytes, are both seen in the field
        if wire is QEMU and length >= len(data) - 4 and isinstance(value, vu.DmaData | vu.DmaWrite):
            continue  # the padding means nothing
        with pytest.raises(vu.BadMessage):
            type(value).unpack(data[:length], wire)


def test_the_replies_about_the_device() -> None:
    info = vfio.DeviceInfo(vfio.DeviceFlags.PCI | vfio.DeviceFlags.RESET, 9, 5)
    data = vu.DeviceInfoReply(info).pack()
    assert data == struct.pack("=IIII", 16, 3, 9, 5)
    assert vu.DeviceInfoReply.unpack(data).info == info
    irq = vu.IrqInfoReply(vfio.IrqInfo(2, vfio.IrqFlags.EVENTFD, 40))
    assert vu.IrqInfoReply.unpack(irq.pack()) == irq
    with pytest.raises(vu.BadMessage, match="at most"):
        vu.IrqInfoReply.unpack(struct.pack("=IIII", 16, 1, 2, 5000))


def test_a_regions_information_is_whole_or_says_how_much_it_needs() -> None:
    areas = vfio.SparseMmap((vfio.Area(0x1000, 0x1000),))
    info = vfio.RegionInfo(
        2, vfio.RegionFlags.READ | vfio.RegionFlags.MMAP | vfio.RegionFlags.CAPS, 0x4000, 0, (areas,)
    )
    whole = vu.RegionInfoReply.answering(vu.GetRegionInfo(2, 4096), info)
    assert whole.complete
    assert vu.RegionInfoReply.unpack(whole.pack()).info == info
    cut = vu.RegionInfoReply.answering(vu.GetRegionInfo(2, 32), info)
    assert not cut.complete
    assert len(cut.pack()) == 32
    told = vu.RegionInfoReply.unpack(cut.pack())
    assert not told.complete
    assert told.needed == len(whole.pack())
    assert vu.RegionInfoReply.answering(vu.GetRegionInfo(2, told.needed), info).complete


def test_a_capability_chain_that_goes_wrong_is_refused() -> None:
    body = vfio.RegionInfo.LAYOUT.pack(40, vfio.RegionFlags.CAPS, 0, 32, 4096, 0) + struct.pack("=HHI", 1, 1, 32)
    with pytest.raises(vu.BadMessage, match="comes back"):
        vu.RegionInfoReply.unpack(body)


def test_ioeventfds_of_both_sizes() -> None:
    subs = (vu.SubRegion(0, 4, 0), vu.SubRegion(8, 0, 1, vu.IoFdType.IOEVENTFD, vu.IoFdFlags.DATAMATCH, 7))
    reply = vu.RegionIoFds(1, subs)
    data = reply.pack()
    assert len(data) == 16 + 2 * 40
    assert vu.RegionIoFds.unpack(data).sub_regions == subs
    shadowed = struct.pack("=IIII", 64, 0, 1, 1) + struct.pack("=QQIIIIQQ", 8, 4, 0, 2, 1, 3, 0x100, 7)
    [sub] = vu.RegionIoFds.unpack(shadowed).sub_regions  # libvfio-user's entry has 48 bytes
    assert (sub.offset, sub.size, sub.fd_index, sub.type, sub.datamatch) == (8, 4, 0, 2, 7)
    short = vu.RegionIoFds(1, subs, limit=16).pack()
    assert len(short) == 16
    assert vu.RegionIoFds.unpack(short).needed == 96
    with pytest.raises(vu.BadMessage, match="an entry has 40 bytes"):
        vu.RegionIoFds.unpack(struct.pack("=IIII", 26, 0, 1, 1) + bytes(10))
    with pytest.raises(vu.BadMessage, match="an entry has 40 bytes"):
        vu.RegionIoFds.unpack(struct.pack("=IIII", 16, 0, 1, 0xFFFF_FFFF))


@pytest.mark.parametrize(
    ("kind", "body", "words"),
    [
        (vu.DmaMap, struct.pack("=IIQQQ", 32, 3, 0, 0, 0), "no bytes"),
        (vu.DmaMap, struct.pack("=IIQQQ", 32, 3, 0, MAX, 2), "beyond the last address"),
        (vu.DmaMap, struct.pack("=IIQQQ", 32, 3, 1 << 63, 0, 1), "file offset"),
        (vu.DmaMap, struct.pack("=IIQQQ", 31, 3, 0, 0, 1), "argsz"),
        (vu.DmaUnmap, struct.pack("=IIQQ", 24, 2, 1, 0), "of all"),
        (vu.DmaUnmap, struct.pack("=IIQQ", 24, 0, 1, 0), "no bytes"),
        (vu.GetDeviceInfo, struct.pack("=IIII", 15, 0, 0, 0), "argsz"),
        (vu.GetRegionInfo, struct.pack("=IIIIQQ", 31, 0, 0, 0, 0, 0), "argsz"),
        (vu.GetRegionIoFds, struct.pack("=IIII", 16, 1, 0, 0), "flags and count 0"),
        (vu.SetIrqs, struct.pack("=IIIII", 20, 0, 0, 0, 0), "one ACTION and one DATA"),
        (vu.SetIrqs, struct.pack("=IIIII", 20, 0x21 | 0x40, 0, 0, 0), "one ACTION and one DATA"),
        (vu.SetIrqs, struct.pack("=IIIII", 20, 0x23, 0, 0, 1), "one ACTION and one DATA"),
        (vu.SetIrqs, struct.pack("=IIIII", 20, 0x21, 0, 0xFFFF_FFFF, 1), "at most"),
        (vu.SetIrqs, struct.pack("=IIIII", 20, 0x22, 0, 0, 4), "booleans"),
        (vu.RegionRead, struct.pack("=QII", 0, 0, 0xFFFF_FFFF), "at most"),
        (vu.RegionWrite, struct.pack("=QII", 0, 0, 4) + b"abc", "3 came"),
        (vu.RegionWrite, struct.pack("=QII", 0, 0, 2) + b"abc", "3 came"),
        (vu.DmaRead, struct.pack("=QQ", 0, 1 << 40), "at most"),
        (vu.DmaWrite, struct.pack("=QQ", MAX, 2) + b"ab", "beyond"),
        (vu.WriteMulti, struct.pack("=Q", 1 << 60), "at most"),
        (vu.WriteMulti, struct.pack("=QQIIQ", 1, 0, 0, 9, 0), "1 to 8"),
        (vu.WriteMulti, struct.pack("=QQIIQ", 1, 0, 0, 0, 0), "1 to 8"),
        (vu.MigrationRead, struct.pack("=II", 8, 100), "argsz"),
        (vu.MigrationWrite, struct.pack("=II", 8, 100), "100 bytes of data"),
    ],
)
def test_what_cannot_be_is_refused_with_what_was_wrong(kind: Any, body: bytes, words: str) -> None:
    with pytest.raises(vu.BadMessage, match=words):
        kind.unpack(body)


def test_fds_and_interrupts_belong_together() -> None:
    two = vu.SetIrqs(2, 0, 2, vfio.IrqAction.TRIGGER, vfio.IrqData.EVENTFD)
    assert two.with_fds([5, 6]).fds == (5, 6)
    assert two.with_fds([]).fds == (-1, -1)
    for wrong in ([5], [5, 6, 7]):
        with pytest.raises(vu.BadMessage, match="or none to take them away"):
            two.with_fds(wrong)
    with pytest.raises(vu.BadMessage, match="none"):
        vu.SetIrqs(2, 0, 2, vfio.IrqAction.TRIGGER).with_fds([5])
    assert vu.SetIrqs(2, 0, 0, vfio.IrqAction.TRIGGER).with_fds([]).is_disable


@given(st.lists(st.sampled_from([-1, 7, 8, 9]), min_size=1, max_size=40), st.integers(0, 5), st.integers(1, 16))
def test_batches_say_the_same_as_the_whole(fds: list[int], start: int, most: int) -> None:
    request = vfio.SetIrqs.eventfds(vfio.IrqAction.TRIGGER, 2, tuple(fds), start)
    said: dict[int, int] = {}
    for message, sent in vu.split_irqs(request, most):
        assert len(sent) <= most
        part = message.with_fds(sent)
        for place, fd in enumerate(part.fds):
            assert part.start + place not in said
            said[part.start + place] = fd
    assert said == {start + place: fd for place, fd in enumerate(fds)}


@given(st.binary(max_size=200), st.sampled_from(sorted(vu.MESSAGES)), st.sampled_from([Wire(), QEMU]))
def test_no_body_breaks_a_parser(body: bytes, command: vu.Command, wire: Wire) -> None:
    for kind in (vu.MESSAGES[command].request, vu.MESSAGES[command].reply):
        try:
            value = kind.unpack(body, wire)
        except vu.BadMessage:
            continue
        value.pack(wire)
