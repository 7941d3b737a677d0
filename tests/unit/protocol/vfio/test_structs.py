"""Structures as bytes: literal ones, round trips, and what an enemy may send.

Rules are those of behaviour.md, sections 4 and 7.
"""

from __future__ import annotations

import struct
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiod.protocol import vfio
from vfiod.protocol.vfio.constants import AtomicCompletion

little = pytest.mark.skipif(sys.byteorder != "little", reason="the literal bytes are little-endian")


# --- literal bytes ---
@little
def test_region_info_with_two_capabilities_as_a_kernel_lays_them_out() -> None:
    buffer = bytes.fromhex(
        "68000000 0f000000 02000000 20000000"  # argsz 104, READ|WRITE|MMAP|CAPS, BAR2, first capability at 32
        "0000010000000000 0000000000020000"  # 64 KiB at 2 << 40
        "0300 0100 28000000"  # MSIX_MAPPABLE v1, next at 40
        "0100 0100 00000000 02000000 00000000"  # SPARSE_MMAP v1, last; two areas
        "0000000000000000 0020000000000000"  # 0, 8 KiB
        "0040000000000000 00c0000000000000"  # 16 KiB, 48 KiB
    )
    region = vfio.RegionInfo.unpack(buffer)
    assert (region.index, region.size, region.offset) == (2, 0x10000, 2 << 40)
    assert region.msix_mappable
    assert region.areas == (vfio.Area(0, 0x2000), vfio.Area(0x4000, 0xC000))
    assert region.type is None


@little
def test_literal_requests() -> None:
    assert vfio.GroupStatus().pack() == bytes.fromhex("0800000000000000")
    flags = vfio.DmaMapFlags.READ | vfio.DmaMapFlags.WRITE
    assert vfio.DmaMap(flags, 0x7F0000000000, 0x1000, 0x2000).pack() == bytes.fromhex(
        "20000000 03000000 00000000007f0000 0010000000000000 0020000000000000"
    )
    assert vfio.DmaUnmap(0x1000, 0x2000).pack() == bytes.fromhex("18000000 00000000 0010000000000000 0020000000000000")
    assert vfio.DeviceFeature(1, vfio.FeatureFlags.PROBE).pack() == bytes.fromhex("08000000 01000400")
    assert vfio.HotReset((5, -1)).pack() == bytes.fromhex("14000000 00000000 02000000 05000000 ffffffff")


@little
def test_hot_reset_info() -> None:
    info = vfio.HotResetInfo.unpack(bytes.fromhex("1c000000 00000000 02000000 07000000 0000 01 00 08000000 0100 02 0b"))
    assert [(d.address, d.group_id) for d in info.devices] == [("0000:01:00.0", 7), ("0001:02:01.3", 8)]
    assert vfio.DependentDevice(0xFFFFFFFF, 0, 0, 0).devid == vfio.VFIO_PCI_DEVID_NOT_OWNED


def test_what_flags_mean() -> None:
    region = vfio.RegionInfo(0, vfio.RegionFlags.READ | vfio.RegionFlags.MMAP, 4096)
    assert region.areas == (vfio.Area(0, 4096),)
    assert vfio.RegionInfo(0, vfio.RegionFlags.READ, 4096).areas == ()
    assert vfio.RegionInfo(0, vfio.RegionFlags.MMAP, 0).areas == (), "size zero is absent"
    sparse = vfio.RegionInfo(0, vfio.RegionFlags.MMAP, 4096, 0, (vfio.SparseMmap(()),))
    assert sparse.areas == (), "an empty sparse capability: nothing may be mapped"
    assert vfio.IrqInfo(0, vfio.IrqFlags.NORESIZE).resizable is False
    assert vfio.Type1Info(vfio.Type1Flags.PGSIZES, 0x40201000).page_size == 0x1000
    assert vfio.Type1Info(vfio.Type1Flags(0), 0x40201000).page_size is None
    assert vfio.Type1Info(vfio.Type1Flags.CAPS).iova_ranges == ()


# --- extended IRQs: an RFC that no kernel has (v3 of "vfio/platform: add support for msi") ---
MESSAGES = (vfio.MsiMessage(0x1_0802_0040, 32), vfio.MsiMessage(0x0802_0040, 33))
TYPE = "0300 0100 {following} 01000000 00000000"  # TYPE v1: type 1 (MSI), subtype 0
WORDS = "40000208 01000000 20000000 40000208 00000000 21000000"  # two messages: address low, high, data


@little
def test_irq_info_with_messages_in_both_layouts() -> None:
    # argsz 72; EVENTFD|CAPS; index 2; 32 vectors; the chain begins at 20, and goes on at 36
    head = bytes.fromhex("48000000 11000000 02000000 20000000 14000000" + TYPE.format(following="24000000"))
    with_word = head + bytes.fromhex("0400 0100 00000000 02000000 00000000" + WORDS)
    without = head + bytes.fromhex("0400 0100 00000000 02000000" + WORDS)
    for buffer in (with_word, without, without + bytes(4)):
        info = vfio.IrqInfo.unpack(buffer)
        assert (info.index, info.count, info.messages) == (2, 32, MESSAGES)
        assert info.type == vfio.IrqTypeCap(vfio.IrqType.MSI, 0)
    assert vfio.IrqInfo.unpack(with_word).pack()[4:] == with_word[4:], "ours have the reserved word"


def test_irq_info_without_capabilities_is_what_every_kernel_knows() -> None:
    assert len(vfio.IrqInfo(1, vfio.IrqFlags.CAPS, 3).pack()) == 16
    plain = vfio.IrqInfo.unpack(vfio.IrqInfo(1, vfio.IrqFlags.EVENTFD, 3).pack())
    assert (plain.type, plain.messages, plain.capabilities) == (None, (), ())
    no_chain = struct.pack("=IIIII", 20, vfio.IrqFlags.CAPS, 1, 3, 0)
    assert vfio.IrqInfo.unpack(no_chain).capabilities == ()


# Id and version of a capability's header as one word, in this machine's order.
TYPE_1, DESCS_1 = struct.unpack("=II", struct.pack("=HHHH", 3, 1, 4, 1))


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ((16, 16, 0, 1), "20 bytes|16 came"),  # the flag, and no room for the offset
        ((20, 16, 0, 1, 8), "offset 8"),  # into the fixed part
        ((20, 16, 0, 1, 20), "offset 20"),  # where the buffer ends
        ((28, 16, 0, 1, 20, TYPE_1, 20), "comes back"),  # to itself
        ((44, 16, 0, 1, 20, TYPE_1, 28, DESCS_1, 20, 0, 0), "comes back"),  # TYPE and MSI_DESCS in a ring
        ((28, 16, 0, 1, 20, TYPE_1, 0), "TYPE has 0 bytes"),
        ((32, 16, 0, 1, 20, DESCS_1, 0, 1), "says 1 messages"),
        ((32, 16, 0, 1, 20, DESCS_1, 0, 0xFFFF_FFFF), "says 4294967295 messages"),
    ],
)
def test_an_irq_chain_that_cannot_be(words: tuple[int, ...], complaint: str) -> None:
    with pytest.raises(vfio.BadStructure, match=complaint):
        vfio.IrqInfo.unpack(struct.pack(f"={len(words)}I", *words))


# --- round trips ---
u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
capability = st.one_of(
    st.builds(vfio.SparseMmap, st.lists(st.builds(vfio.Area, u64, u64), max_size=5).map(tuple)),
    st.builds(vfio.RegionTypeCap, u32, u32),
    st.just(vfio.MsixMappable()),
)


@given(st.lists(capability, max_size=6).map(tuple), u32, u64, u64)
def test_region_info_round_trip(chain: tuple[vfio.Capability, ...], index: int, size: int, offset: int) -> None:
    flags = vfio.RegionFlags.READ | (vfio.RegionFlags.CAPS if chain else vfio.RegionFlags(0))
    region = vfio.RegionInfo(index, flags, size, offset, chain)
    packed = region.pack()
    assert vfio.argsz_of(packed) == len(packed)
    assert vfio.RegionInfo.unpack(packed) == region


@given(u32, st.lists(st.builds(vfio.MsiMessage, u64, u32), max_size=5).map(tuple), st.integers(1, 9))
def test_irq_info_round_trip(index: int, messages: tuple[vfio.MsiMessage, ...], count: int) -> None:
    chain = (vfio.IrqTypeCap(vfio.IrqType.MSI, 0), vfio.MsiDescs(messages))
    info = vfio.IrqInfo(index, vfio.IrqFlags.EVENTFD | vfio.IrqFlags.CAPS, count, chain)
    packed = info.pack()
    assert vfio.argsz_of(packed) == len(packed)
    assert vfio.IrqInfo.unpack(packed) == info


@given(st.lists(st.tuples(u64, u64), max_size=5).map(tuple), u32)
def test_type1_info_round_trip(ranges: tuple[tuple[int, int], ...], avail: int) -> None:
    chain = (vfio.IovaRanges(ranges), vfio.MigrationInfo(0, 1 << 12, 256), vfio.DmaAvailable(avail))
    info = vfio.Type1Info(vfio.Type1Flags.PGSIZES | vfio.Type1Flags.CAPS, 1 << 12, chain)
    assert vfio.Type1Info.unpack(info.pack()) == info
    assert info.iova_ranges == ranges
    assert info.capabilities[-1] == vfio.DmaAvailable(avail)


def test_device_info_keeps_capabilities_it_does_not_know() -> None:
    chain = (
        vfio.UnknownCapability(1, 1, b"zpci base"),
        vfio.PciAtomicCompletion(AtomicCompletion.COMP32 | AtomicCompletion.COMP64),
    )
    back = vfio.DeviceInfo.unpack(vfio.DeviceInfo(vfio.DeviceFlags.PCI, 9, 5, chain).pack())
    unknown, atomic = back.capabilities
    assert isinstance(unknown, vfio.UnknownCapability)
    assert unknown.body.startswith(b"zpci base")
    assert atomic == chain[1]


def test_flags_nobody_knows_are_kept() -> None:
    assert vfio.DeviceInfo.unpack(struct.pack("=IIII", 16, 1 << 20, 9, 5)).flags == 1 << 20


# --- an enemy's bytes ---
@given(st.binary(max_size=300))
def test_garbage_is_a_structure_or_is_refused(data: bytes) -> None:
    for kind in (
        vfio.GroupStatus,
        vfio.DeviceInfo,
        vfio.RegionInfo,
        vfio.IrqInfo,
        vfio.Type1Info,
        vfio.HotResetInfo,
        vfio.HotReset,
        vfio.DmaMap,
        vfio.DmaUnmap,
        vfio.DeviceFeature,
        vfio.SetIrqs,
    ):
        try:
            kind.unpack(data)
        except vfio.BadStructure as error:
            assert str(error)


@given(st.binary(max_size=200), st.integers(0, 220))
def test_a_garbage_irq_chain_is_bounded(data: bytes, first: int) -> None:
    fixed = struct.pack("=IIIII", 20 + len(data), vfio.IrqFlags.CAPS, 0, 1, first)
    try:
        info = vfio.IrqInfo.unpack(fixed + data)
    except vfio.BadStructure as error:
        assert str(error)
    else:
        assert len(info.messages) * 12 <= len(data)


def region_with(chain: bytes, first: int = 32) -> bytes:
    flags = vfio.RegionFlags.CAPS
    return vfio.RegionInfo.LAYOUT.pack(32 + len(chain), flags, 0, first, 4096, 0) + chain


def header(number: int, following: int, version: int = 1) -> bytes:
    return struct.pack("=HHI", number, version, following)


@pytest.mark.parametrize(
    ("buffer", "words"),
    [
        (region_with(header(3, 32)), "comes back to offset 32"),
        (region_with(header(3, 40) + header(3, 32)), "comes back to offset 32"),
        (region_with(header(3, 8)), "offset 8 lies outside"),
        (region_with(header(3, 4096)), "offset 4096 lies outside"),
        (region_with(header(3, 36)), "offset 36 lies outside"),
        (region_with(b"", first=0xFFFFFFFF), "offset 4294967295 lies outside"),
        (region_with(header(1, 0) + struct.pack("=II", 0xFFFFFFFF, 0)), "says 4294967295 areas"),
        (region_with(header(1, 0)), "SPARSE_MMAP has 0 bytes"),
        (region_with(header(2, 0) + bytes(4)), "TYPE has 4 bytes"),
        (region_with(b"".join(header(9, 32 + 8 * (n + 1)) for n in range(70)) + header(9, 0)), "more than 64"),
    ],
)
def test_chains_of_an_enemy_are_refused(buffer: bytes, words: str) -> None:
    with pytest.raises(vfio.BadStructure, match=words):
        vfio.RegionInfo.unpack(buffer)


def test_a_capability_cannot_read_into_the_next_one() -> None:
    """The first one claims an area it has no room for before the second."""
    chain = header(1, 48) + struct.pack("=II", 1, 0) + header(2, 0) + struct.pack("=II", 1, 2)
    with pytest.raises(vfio.BadStructure, match="says 1 areas"):
        vfio.RegionInfo.unpack(region_with(chain))


def test_a_chain_may_run_backwards_through_the_buffer() -> None:
    chain = header(3, 0) + header(2, 32) + struct.pack("=II", 7, 8)
    region = vfio.RegionInfo.unpack(region_with(chain, first=40))
    assert region.type == vfio.RegionTypeCap(7, 8)
    assert region.msix_mappable


def test_cap_offset_zero_is_no_chain() -> None:
    assert vfio.RegionInfo.unpack(region_with(b"", first=0)).capabilities == ()


def test_a_version_of_zero_is_not_ours() -> None:
    region = vfio.RegionInfo.unpack(region_with(header(2, 0, version=0) + struct.pack("=II", 1, 2)))
    assert region.type is None
    assert isinstance(region.capabilities[0], vfio.UnknownCapability)


# --- SET_IRQS ---
@given(
    st.builds(vfio.SetIrqs.eventfds, st.sampled_from(vfio.IrqAction), u32, st.lists(st.integers(-1, 9)).map(tuple), u32)
)
def test_set_irqs_round_trip(request: vfio.SetIrqs) -> None:
    packed = request.pack()
    assert vfio.argsz_of(packed) == len(packed) == 20 + 4 * request.count
    assert vfio.SetIrqs.unpack(packed) == request


@little
def test_set_irqs_literal() -> None:
    assert vfio.SetIrqs.disable(1).pack() == bytes.fromhex("14000000 21000000 01000000 00000000 00000000")
    assert vfio.SetIrqs.now(vfio.IrqAction.UNMASK, 0).pack() == bytes.fromhex(
        "14000000 11000000 00000000 00000000 01000000"
    )
    bools = vfio.SetIrqs(1, 2, 3, vfio.IrqAction.TRIGGER, vfio.IrqData.BOOL, values=(True, False, True))
    assert bools.pack() == bytes.fromhex("17000000 22000000 01000000 02000000 03000000 010001")
    assert vfio.SetIrqs.unpack(bools.pack()) == bools


def test_set_irqs_says_what_it_does() -> None:
    assert vfio.SetIrqs.disable(1).describe() == "disable"
    assert vfio.SetIrqs.eventfds(vfio.IrqAction.TRIGGER, 1, (3, 4), 2).describe() == "TRIGGER of 2 to 3 by EVENTFD"
    assert vfio.SetIrqs.now(vfio.IrqAction.MASK, 0).describe() == "MASK of 0"


def test_set_irqs_takes_no_nonsense() -> None:
    with pytest.raises(ValueError, match="count of 1 or more"):
        vfio.SetIrqs.now(vfio.IrqAction.TRIGGER, 1, count=0)
    with pytest.raises(ValueError, match="takes 2 fds and 0 booleans"):
        vfio.SetIrqs(0, 0, 2, vfio.IrqAction.TRIGGER, vfio.IrqData.EVENTFD, fds=(1,))
    for flags in (0x03 | 0x20, 0x01, 0x20, 0x30 | 0x01, 0x21 | 0x100):
        with pytest.raises(vfio.BadStructure, match="flags"):
            vfio.SetIrqs.unpack(struct.pack("=IIIII", 20, flags, 0, 0, 0))
    with pytest.raises(vfio.BadStructure, match="says 4294967295 interrupts"):
        vfio.SetIrqs.unpack(struct.pack("=IIIII", 20, 0x24, 0, 0, 0xFFFFFFFF))
