"""Structures of the channel subsystem, against bytes written by hand from the architecture.

Rules are those of behaviour.md, section 9.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from msgspec import structs

from vfiod.protocol.channel import (
    Actl,
    BadChannelStructure,
    Ccw,
    CcwFlags,
    Ciw,
    Crw,
    CrwErc,
    CrwRsc,
    Cstat,
    Dstat,
    Erw,
    ErwFlags,
    Esw,
    Fctl,
    Idaws,
    Irb,
    Orb,
    OrbFlags,
    Pmcw,
    PmcwFlags,
    Schib,
    Scsw,
    ScswFlags,
    SenseId,
    Stctl,
    explain_crw,
    explain_irb,
    explain_orb,
    explain_schib,
)
from vfiod.protocol.channel.ccw import LIMIT_31, read_idaws, segments, write_idaws
from vfiod.protocol.channel.words import summary
from vfiod.protocol.vfio import BadStructure
from vfiod.protocol.vfio import ccw as region

# Masks of QEMU's include/hw/s390x/ioinst.h, written down as whole words.
ORB_BITS = {
    OrbFlags.SPND: "08000000", OrbFlags.STREAMING: "04000000", OrbFlags.MOD: "02000000", OrbFlags.SYNC: "01000000",
    OrbFlags.FMT: "00800000", OrbFlags.PFCH: "00400000", OrbFlags.ISIC: "00200000", OrbFlags.ALCC: "00100000",
    OrbFlags.SSIC: "00080000", OrbFlags.TRANSPORT: "00040000", OrbFlags.C64: "00020000", OrbFlags.I2K: "00010000",
    OrbFlags.ILS: "00000080", OrbFlags.MIDAW: "00000040", OrbFlags.ORBX: "00000001",
}  # fmt: skip
SCSW_BITS = {
    Scsw(key=15): "f0000000", Scsw(flags=ScswFlags.SCTL): "08000000", Scsw(flags=ScswFlags.ESWF): "04000000",
    Scsw(cc=3): "03000000", Scsw(flags=ScswFlags.FMT): "00800000", Scsw(flags=ScswFlags.ECTL): "00020000",
    Scsw(flags=ScswFlags.PNO): "00010000", Scsw(fctl=Fctl.START): "00004000", Scsw(fctl=Fctl.HALT): "00002000",
    Scsw(fctl=Fctl.CLEAR): "00001000", Scsw(actl=Actl.RESUME_PENDING): "00000800",
    Scsw(actl=Actl.START_PENDING): "00000400", Scsw(actl=Actl.HALT_PENDING): "00000200",
    Scsw(actl=Actl.CLEAR_PENDING): "00000100", Scsw(actl=Actl.SUBCHANNEL_ACTIVE): "00000080",
    Scsw(actl=Actl.DEVICE_ACTIVE): "00000040", Scsw(actl=Actl.SUSPENDED): "00000020",
    Scsw(stctl=Stctl.ALERT): "00000010", Scsw(stctl=Stctl.INTERMEDIATE): "00000008",
    Scsw(stctl=Stctl.PRIMARY): "00000004", Scsw(stctl=Stctl.SECONDARY): "00000002",
    Scsw(stctl=Stctl.STATUS_PENDING): "00000001",
}  # fmt: skip


def test_orb() -> None:
    for flag, word in ORB_BITS.items():
        assert Orb(0, lpm=0, flags=flag).pack() == bytes(4) + bytes.fromhex(word) + bytes(4)
    orb = Orb(0x7FFFFFF8, intparm=0xDEADBEEF, key=0xA, lpm=0x80)
    assert orb.pack().hex() == "deadbeefa0c080007ffffff8"
    assert Orb.unpack(orb.pack()) == orb
    assert explain_orb(orb)[0] == "program of format-1 CCWs at 0x7ffffff8"
    assert [Orb(0, flags=flags).idaws for flags in (OrbFlags(0), OrbFlags.C64, OrbFlags.C64 | OrbFlags.I2K)] == [
        Idaws.FORMAT_1, Idaws.FORMAT_2_4K, Idaws.FORMAT_2_2K,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "orb, words",
    [
        (Orb(1 << 31), "not below 0x80000000"),
        (Orb(1 << 24, flags=OrbFlags.PFCH), "not below 0x1000000"),
        (Orb(-8), "not below"),
        (Orb(4), "not a multiple of 8"),
        (Orb(0, key=16), "key has 4 bits, got 16"),
        (Orb(0, lpm=256), "lpm has 8 bits"),
        (Orb(0, intparm=1 << 32), "intparm has 32 bits"),
        (Orb(0, flags=OrbFlags(1 << 28)), "no flags"),
    ],
)
def test_orbs_that_cannot_be(orb: Orb, words: str) -> None:
    with pytest.raises(BadChannelStructure, match=words):
        orb.check()


def test_ccws() -> None:
    ccw = Ccw(0xE4, 0x123456, 7, CcwFlags.CHAIN_COMMAND | CcwFlags.SUPPRESS_LENGTH)
    assert ccw.pack(0).hex() == "e412345660000007"
    assert ccw.pack(1).hex() == "e460000700123456"
    assert Ccw.unpack(ccw.pack(0), 0) == Ccw.unpack(ccw.pack(1), 1) == ccw
    with pytest.raises(BadChannelStructure, match="format-0 CCW is not below 0x1000000"):
        Ccw(0xE4, 1 << 24, 7).pack(0)
    with pytest.raises(BadChannelStructure, match="count of 0 to 65535"):
        Ccw(0xE4, 0, 65536).pack(1)
    assert [f"{int(one):02x}" for one in CcwFlags] == ["80", "40", "20", "10", "08", "04", "02", "01"]


def test_idaws() -> None:
    assert write_idaws(Idaws.FORMAT_1, 0x1100, 0x1000).hex() == "000011000000180000002000"
    assert write_idaws(Idaws.FORMAT_2_2K, 0x1100, 0x1000).hex() == f"{0x1100:016x}{0x1800:016x}{0x2000:016x}"
    assert write_idaws(Idaws.FORMAT_2_4K, 0x1_0000_1100, 0x1000).hex() == f"{0x100001100:016x}{0x100002000:016x}"
    for idaws in (Idaws.FORMAT_1, Idaws.FORMAT_2_2K, Idaws.FORMAT_2_4K):
        for address, length in ((0, 1), (4095, 1), (4095, 2), (2048, 2048), (1, 65535)):
            words = write_idaws(idaws, address, length)
            memory = {0x8000: words}

            def fetch(at: int, size: int, memory: dict[int, bytes] = memory) -> bytes:
                return memory[0x8000][at - 0x8000 : at - 0x8000 + size]

            found = segments(Ccw(2, 0x8000, length, CcwFlags.INDIRECT), idaws, fetch)
            assert sum(size for _, size in found) == length
            assert found[0][0] == address
            assert all(a + n == b for (a, n), (b, _) in itertools.pairwise(found))
    with pytest.raises(BadChannelStructure, match="not below"):
        read_idaws(Idaws.FORMAT_1, b"\x80\0\0\0")
    with pytest.raises(BadChannelStructure, match="reach beyond"):
        write_idaws(Idaws.FORMAT_1, LIMIT_31 - 1, 2)


def test_scsw() -> None:
    for scsw, word in SCSW_BITS.items():
        assert scsw.pack() == bytes.fromhex(word) + bytes(8)
    whole = bytes.fromhex("00c04007000010100c000019")
    scsw = Scsw.unpack(whole)
    assert scsw == Scsw(
        flags=ScswFlags.FMT | ScswFlags.PFCH, fctl=Fctl.START,
        stctl=Stctl.PRIMARY | Stctl.SECONDARY | Stctl.STATUS_PENDING,
        cpa=0x1010, dstat=Dstat.CHANNEL_END | Dstat.DEVICE_END, count=25,
    )  # fmt: skip
    assert scsw.pack() == whole
    assert scsw.solicited and scsw.pending and not scsw.active
    assert not Scsw(stctl=Stctl.ALERT | Stctl.STATUS_PENDING).solicited
    assert Scsw(cc=3, stctl=Stctl.ALERT | Stctl.STATUS_PENDING).solicited


def test_irb_with_sense() -> None:
    sense = bytes.fromhex("8004") + bytes(30)
    irb = Irb(
        scsw=Scsw(flags=ScswFlags.ESWF | ScswFlags.ECTL, stctl=Stctl(0x17), dstat=Dstat(0x0E), cpa=0x1008),
        esw=Esw(word0=0x00800000, erw=Erw(ErwFlags.CONS, 32)),
        ecw=sense,
    )
    data = irb.pack()
    assert len(data) == 96
    assert data[12:20].hex() == "0080000001200000"  # path 80; sense, 32 bytes of it
    assert Irb.unpack(data) == irb
    assert irb.sense == sense and irb.esw.lpum == 0x80
    without_count = structs.replace(irb, esw=structs.replace(irb.esw, erw=structs.replace(irb.esw.erw, scnt=0)))
    assert without_count.sense == irb.ecw  # as QEMU leaves it
    words = explain_irb(irb)
    assert words[0] == "unit check"
    assert any(line.startswith("command reject") for line in words)
    with pytest.raises(BadChannelStructure, match="An IRB has 96 bytes, got 95"):
        Irb.unpack(data[:95])


def test_logout_and_failing_address() -> None:
    irb = Irb(
        scsw=Scsw(flags=ScswFlags.ESWF, stctl=Stctl(0x17), cstat=Cstat.CHANNEL_DATA_CHECK),
        esw=Esw(word0=0x04804000, erw=Erw(ErwFlags.FSAVF | ErwFlags.FSAF), faddr=(1, 0x2000)),
    )
    assert irb.logout is not None and irb.logout.pack() == 0x04804000
    assert irb.esw.failing_address == 0x1_0000_2000
    assert "storage failed at 0x100002000" in explain_irb(irb)


def test_summaries() -> None:
    pending = Stctl.STATUS_PENDING
    cases = {
        Scsw(): "no status (idle)",
        Scsw(cc=3, stctl=pending): "deferred condition code 3: not operational, no path to the device works",
        Scsw(fctl=Fctl.CLEAR, stctl=pending): "cleared",
        Scsw(fctl=Fctl.START | Fctl.HALT, stctl=pending | Stctl.PRIMARY): "halted",
        Scsw(fctl=Fctl.START, actl=Actl.SUSPENDED, stctl=pending | Stctl.INTERMEDIATE): "suspended",
        Scsw(stctl=pending | Stctl.ALERT, dstat=Dstat.ATTENTION): "unsolicited: attention",
        Scsw(stctl=pending | Stctl.PRIMARY, dstat=Dstat.CHANNEL_END): "transfer over, device still at work",
        Scsw(stctl=Stctl(0x17), cstat=Cstat.PROGRAM_CHECK): "program check",
    }
    assert {summary(scsw): words for scsw, words in cases.items()} == {words: words for words in cases.values()}


def test_schib() -> None:
    pmcw = Pmcw(
        intparm=1, flags=PmcwFlags.ENA | PmcwFlags.DNV, isc=3, dev=0x3F3F, lpm=0x80, pim=0x80, pom=0xFF, pam=0x80,
        chpid=bytes([0x42]) + bytes(7), csense=True,
    )  # fmt: skip
    data = Schib(pmcw).pack()
    assert len(data) == 52
    assert data[:8].hex() == "0000000118813f3f"
    assert data[24:28].hex() == "00000001"
    assert Schib.unpack(data) == Schib(pmcw)
    assert explain_schib(Schib(pmcw))[:2] == [
        "device 3f3f, enabled, interruption subclass 3",
        "channel paths 42; available 0x80, operational 0xff, last used 0x00",
    ]


def test_crw_and_sense_id() -> None:
    crw = Crw(CrwRsc.CHANNEL_PATH, CrwErc.PERMANENT_ERROR_NOT_INITIALIZED, 0x42)
    assert crw.pack().hex() == "04060042"
    assert Crw.unpack(crw.pack()) == crw
    assert explain_crw(crw) == "channel path 0x0042: permanent error not initialized"
    told = SenseId(0x3990, 0xE9, 0x3390, 0x0A, (Ciw(0, 0xFA, 256),))
    assert told.pack().hex() == "ff3990e933900a0040fa0100"
    assert SenseId.unpack(told.pack()) == told
    assert SenseId.unpack(told.pack()[:7]) == SenseId(0x3990, 0xE9, 0x3390, 0x0A)
    assert told.describe() == "control unit 3990-e9, device 3390-0a"
    for wrong in (b"", b"\xff\x39\x90", bytes(7)):
        with pytest.raises(BadChannelStructure, match="begin with ff"):
            SenseId.unpack(wrong)


def test_whatever_comes_is_read_and_explained() -> None:
    for _ in range(500):
        data = os.urandom(12)
        assert Orb.unpack(data).pack() == data
        explain_orb(Orb.unpack(data))
        irb = Irb.unpack(os.urandom(96))
        assert Irb.unpack(irb.pack()) == irb
        assert explain_irb(irb)
        schib = Schib.unpack(os.urandom(52))
        assert Schib.unpack(schib.pack()) == schib
        assert explain_schib(schib)
        explain_crw(Crw.unpack(os.urandom(4)))
        assert Scsw.unpack(data).pack()[4:] == data[4:]


def test_regions() -> None:
    io = region.CcwIoRegion(b"o" * 12, b"s" * 12, b"i" * 96, -22)
    assert io.pack()[:120] == b"o" * 12 + b"s" * 12 + b"i" * 96
    assert region.CcwIoRegion.unpack(io.pack()) == io
    command = region.CcwCmdRegion(region.AsyncCommand.CSCH, -16)
    assert region.CcwCmdRegion.unpack(command.pack()) == command
    for kind, size in ((region.CcwIoRegion, 124), (region.CcwCmdRegion, 8)):
        with pytest.raises(BadStructure, match=f"has {size} bytes, 3 came"):
            kind.unpack(b"123")


PROBE = r"""
#include <stdio.h>
#include <stddef.h>
#include <linux/vfio.h>
#include <linux/vfio_ccw.h>
int main(void) {
    printf("%zu %zu %zu %zu ", sizeof(struct ccw_io_region), offsetof(struct ccw_io_region, scsw_area),
           offsetof(struct ccw_io_region, irb_area), offsetof(struct ccw_io_region, ret_code));
    printf("%zu %zu %zu ", sizeof(struct ccw_cmd_region), sizeof(struct ccw_schib_region),
           sizeof(struct ccw_crw_region));
    printf("%d %d %d ", VFIO_REGION_SUBTYPE_CCW_ASYNC_CMD, VFIO_REGION_SUBTYPE_CCW_SCHIB, VFIO_REGION_SUBTYPE_CCW_CRW);
    printf("%d %d %d ", VFIO_CCW_IO_IRQ_INDEX, VFIO_CCW_CRW_IRQ_INDEX, VFIO_CCW_REQ_IRQ_INDEX);
    printf("%d %d %d", VFIO_CCW_CONFIG_REGION_INDEX, VFIO_CCW_ASYNC_CMD_HSCH, VFIO_CCW_ASYNC_CMD_CSCH);
    return 0;
}
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler")
@pytest.mark.skipif(not Path("/usr/include/linux/vfio_ccw.h").exists(), reason="no kernel headers")
def test_the_kernels_header_says_the_same(tmp_path: Path) -> None:
    source = tmp_path / "probe.c"
    source.write_text(PROBE)
    subprocess.run(["gcc", "-o", tmp_path / "probe", source], check=True)
    said = subprocess.run([tmp_path / "probe"], check=True, capture_output=True, text=True).stdout
    ours = (
        region.CcwIoRegion.LAYOUT.size, 12, 24, 120,
        region.CcwCmdRegion.LAYOUT.size, region.SCHIB_REGION_SIZE, region.CRW_REGION_SIZE,
        *region.CcwSubtype, *region.CcwIrq, region.CcwRegion.CONFIG, *region.AsyncCommand,
    )  # fmt: skip
    assert [int(one) for one in said.split()] == [int(one) for one in ours]
