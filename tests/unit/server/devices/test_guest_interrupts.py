"""MSI and MSI-X as a guest and a hypervisor use them, through commands: behaviour.md, sections 4 and 5."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from vfiod.protocol.catalogue.interrupts import IrqModeChanged
from vfiod.protocol.errors import CommandError, InvalidArgument, OperationFailed
from vfiod.protocol.vfio import PciIrq, SetIrqs
from vfiod.server.kernel.syscalls import PAGE_SIZE

MSI, MSIX = 0x40, 0xA0
ENABLE, MASK_ALL = 0x8000, 0x4000
TABLE, PBA = 0x800, 0xC00
RAISE = 0x14


async def add(world: Any, *, msix: int = 8, resizable: bool = False, granted: int | None = None, **more: Any) -> Any:
    world.rigs.msix, world.rigs.resizable, world.rigs.granted = msix, resizable, granted
    rig = await world.add(**more)
    await config(world, 4, 2, 6)
    rig.log.clear()
    return rig


async def config(world: Any, offset: int, size: int, value: int | None = None) -> Any:
    if value is None:
        return (await world.command("region-read", device="n0", region="config", offset=offset, size=size)).value
    return await world.command("region-write", device="n0", region="config", offset=offset, size=size, value=value)


async def bar(world: Any, offset: int, value: int | None = None, size: int = 4) -> Any:
    if value is None:
        return (await world.command("region-read", device="n0", region="bar0", offset=offset, size=size)).value
    return await world.command("region-write", device="n0", region="bar0", offset=offset, size=size, value=value)


async def unmask(world: Any, vector: int, *, masked: int = 0) -> None:
    await bar(world, TABLE + 16 * vector + 12, masked)


async def start(world: Any, *vectors: int, index: str = "msix", **more: Any) -> dict[int, Any]:
    reply = await world.command("irq-start", device="n0", index=index, vectors=list(vectors), **more)
    return {irq.vector: bell for irq, bell in zip(reply.irqs, world.attached, strict=True)}


def armed(request: SetIrqs) -> tuple[int, tuple[bool, ...]]:
    """Where it begins, and which have an eventfd."""
    return request.start, tuple(fd >= 0 for fd in request.fds)


def kinds(world: Any) -> list[str]:
    return [event.kind.value for event in world.told(IrqModeChanged)]


# --- MSI-X by irq-start -------------------------------------------------------------------------------------------


def test_one_by_one_without_growing(play: Any) -> None:
    """Section 4: a higher vector disables and enables again; within range just that one; released is -1."""

    async def scenario(world: Any) -> None:
        rig = await add(world)
        bells = await start(world, 1)
        assert [armed(r) for r in rig.log] == [(0, (False, True))]
        rig.log.clear()
        bells |= await start(world, 4)
        assert rig.log[0].is_disable
        assert [armed(r) for r in rig.log[1:]] == [(0, (False, True, False, False, True))]
        assert (bells[1].rung(), bells[4].rung()) == (1, 1), "every used vector is signalled once"
        rig.log.clear()
        bells |= await start(world, 2)
        assert [armed(r) for r in rig.log] == [(2, (True,))]
        assert [bells[v].rung() for v in (1, 2, 4)] == [0, 1, 0], "just that vector, once"
        rig.log.clear()
        await world.command("irq-stop", device="n0", index="msix", vectors=[4])
        assert [armed(r) for r in rig.log] == [(4, (False,))]
        await bar(world, RAISE, 1 << 2 | 1 << 4)
        assert [bells[v].rung() for v in (1, 2, 4)] == [0, 1, 0]
        assert (await bells_of(world)) == [1, 2]
        bells = await start(world, 4)
        assert bells[4].rung() >= 1, "what waited in the device comes with the vector"

    play(scenario)


async def bells_of(world: Any) -> list[int]:
    return [vector.vector for vector in (await world.irq("msix")).vectors]


def test_one_by_one_where_the_kernel_grows(play: Any) -> None:
    """Section 4: "where the kernel allows growing (no NORESIZE flag), sets only the new one"."""

    async def scenario(world: Any) -> None:
        rig = await add(world, resizable=True)
        assert not (await world.irq("msix")).flags.noresize
        bells = await start(world, 0)
        rig.log.clear()
        bells |= await start(world, 5)
        assert [armed(r) for r in rig.log] == [(5, (True,))]
        assert (bells[0].rung(), bells[5].rung()) == (0, 0)
        await bar(world, RAISE, 1 << 5 | 1)
        assert (bells[0].rung(), bells[5].rung()) == (1, 1)

    play(scenario)


def test_direct_and_relayed_are_decided_per_vector(play: Any) -> None:
    async def scenario(world: Any) -> None:
        await add(world)
        bells = await start(world, 0)
        bells |= await start(world, 1, mode="relayed")
        for bell in bells.values():
            bell.rung()
        await bar(world, RAISE, 0b11)
        assert bells[0].rung() == 1
        await world.settle()
        assert bells[1].rung() == 1
        info = await world.irq("msix")
        assert [(v.vector, v.mode, v.fired) for v in info.vectors] == [(0, "direct", None), (1, "relayed", 1)]

    play(scenario)


def test_what_cannot_be_started_leaves_all_as_it_was(play: Any) -> None:
    """Vector numbers out of range; a host with fewer vectors, which are not rounded to a power of two."""

    async def scenario(world: Any) -> None:
        rig = await add(world, granted=3)
        bells = await start(world, 0)
        for vectors, words in (([8], "has 8 vectors: there is no vector 8"), ([0, 8], "no vector 8")):
            with pytest.raises(InvalidArgument, match=words):
                await world.command("irq-start", device="n0", index="msix", vectors=vectors)
        with pytest.raises(OperationFailed, match="3 are available, start vectors 0 to 2"):
            await world.command("irq-start", device="n0", index="msix", vectors=[6])
        bells[0].rung()
        await bar(world, RAISE, 1)
        assert bells[0].rung() == 1
        assert (await bells_of(world)) == [0]
        assert rig.irqs.kind is PciIrq.MSIX

    play(scenario)


def test_a_growth_that_fails_comes_back_to_what_was(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await add(world)
        bells = await start(world, 0)
        rig.fail_set_irqs = lambda r: (_ for _ in ()).throw(OSError(errno.EIO, "no")) if r.count == 4 else None
        with pytest.raises(OperationFailed, match="EIO"):
            await world.command("irq-start", device="n0", index="msix", vectors=[3])
        bells[0].rung()
        await bar(world, RAISE, 1)
        assert bells[0].rung() == 1

    play(scenario)


def test_a_reset_keeps_the_vectors(play: Any) -> None:
    """Section 6, for MSI-X: the same eventfds; the guest's table and enable bit stay."""

    async def scenario(world: Any) -> None:
        await add(world)
        bells = await start(world, 0, 3)
        await unmask(world, 3)
        await world.command("device-reset", id="n0")
        assert await config(world, MSIX + 2, 2) & ENABLE
        assert await bar(world, TABLE + 60) == 0
        await config(world, 4, 2, 6)
        for bell in bells.values():
            bell.rung()
        await bar(world, RAISE, 0b1001)
        assert (bells[0].rung(), bells[3].rung()) == (1, 1)

    play(scenario)


# --- what the guest does --------------------------------------------------------------------------------------------


def test_the_guests_enable_bit_starts_msi_with_as_many_as_it_allocated(play: Any) -> None:
    """Section 5: "Turning the enable bit of MSI or MSI-X on or off by a config write does the change of section 4"."""

    async def scenario(world: Any) -> None:
        rig = await add(world)
        await config(world, MSI + 2, 2, 0x20)
        assert rig.log == []
        await config(world, MSI + 2, 2, 0x21)
        assert [armed(r) for r in rig.log] == [(0, (True,) * 4)]
        assert kinds(world) == ["msi"]
        bells = await start(world, 0, 1, 2, 3, index="msi")
        await bar(world, RAISE, 0b1000)
        assert [bells[v].rung() for v in range(4)] == [0, 0, 0, 1]
        await config(world, MSI + 2, 2, 0x20)
        assert (await config(world, MSI + 2, 2)) & 0x71 == 0, "disabling sets the field to 0"
        assert kinds(world)[-1] == "intx"

    play(scenario)


@pytest.mark.parametrize(("granted", "left", "field"), [(3, 2, 1), (2, 2, 1), (1, 1, 0)])
def test_a_host_with_fewer_vectors_is_asked_again(play: Any, granted: int, left: int, field: int) -> None:
    """Section 4, MSI: "retry with that ... rounded down to a power of two, and write its logarithm to the guest's
    enabled-messages field"."""

    async def scenario(world: Any) -> None:
        rig = await add(world, granted=granted, msix=0)
        await config(world, MSI + 2, 2, 0x21)
        assert [r.count for r in rig.log if not r.is_disable] == [4, left]
        assert await config(world, MSI + 2, 2) & 0x71 == field << 4 | 1
        assert "it allocated 4, the host has no more" in world.told(IrqModeChanged)[-1].reason

    play(scenario)


def test_enospc_says_no_number_so_the_next_lower_power_of_two_is_tried(play: Any) -> None:
    """Section 4, MSI: "(a positive return says how many; ENOSPC does not) ... or with the next lower power of two"."""

    async def scenario(world: Any) -> None:
        rig = await add(world)

        def refuse(request: SetIrqs) -> None:
            if request.count > 1:
                raise OSError(errno.ENOSPC, "full")

        rig.fail_set_irqs = refuse
        await config(world, MSI + 2, 2, 0x21)
        assert [r.count for r in rig.log if not r.is_disable] == [4, 2, 1]
        assert await config(world, MSI + 2, 2) & 0x71 == 1

    play(scenario)


def test_a_start_by_the_guest_that_fails_leaves_its_bit_as_it_was(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await add(world)
        (bell,) = (await start(world, 0, index="intx")).values()
        rig.fail_set_irqs = lambda r: (_ for _ in ()).throw(OSError(errno.EIO, "no")) if r.index == 1 else None
        with pytest.raises(CommandError, match="EIO"):
            await config(world, MSI + 2, 2, 0x21)
        assert await config(world, MSI + 2, 2) & 1 == 0
        assert [fd.name for fd in world.machine.device("n0").fds()] == ["intx0 trigger", "intx0 relay", "err", "req"]
        rig.irqs.set_line(True)
        await world.settle()
        assert bell.rung() == 1

    play(scenario)


def test_disabling_goes_back_to_the_intx_of_before(play: Any) -> None:
    """Section 4: "the guest's disabling of MSI or MSI-X goes back to INTx", with the eventfd the hypervisor has."""

    async def scenario(world: Any) -> None:
        rig = await add(world)
        (bell,) = (await start(world, 0, index="intx")).values()
        for capability, on, off in ((MSI, 1, 0), (MSIX, ENABLE, 0)):
            await config(world, capability + 2, 2, on)
            assert rig.irqs.kind == (PciIrq.MSI if capability == MSI else PciIrq.MSIX)
            await config(world, capability + 2, 2, off)
            assert rig.irqs.kind == PciIrq.INTX
            rig.irqs.set_line(True)
            await world.settle()
            assert bell.rung() == 1
            rig.irqs.set_line(False)
            await world.command("irq-eoi", device="n0", index="intx")
        # The same after an irq-start of messages.
        await start(world, 0, index="msi")
        await config(world, MSI + 2, 2, 0)
        rig.irqs.set_line(True)
        await world.settle()
        assert bell.rung() == 1

    play(scenario)


def test_a_switch_between_them_passes_through_none(play: Any) -> None:
    """Section 4: "but switching between them ... end at none"; "Enabling one disables the others"."""

    async def scenario(world: Any) -> None:
        rig = await add(world)
        await config(world, MSI + 2, 2, 1)
        rig.log.clear()
        await config(world, MSIX + 2, 2, ENABLE)
        assert rig.say() == ["msi disable", "msix trigger -1"]
        assert await config(world, MSI + 2, 2) & 1 == 0
        assert kinds(world) == ["msi", "msix"]

    play(scenario)


def test_a_device_without_a_pin_ends_at_none(play: Any) -> None:
    """Section 4: "No pin, no INTx"."""

    async def scenario(world: Any) -> None:
        from vfiod.server.mdev.parent import IrqInfo

        await add(world, prepare=lambda rig: rig.irq.update({0: IrqInfo(0)}))
        assert await config(world, 0x3D, 1) == 0
        await config(world, MSIX + 2, 2, ENABLE)
        await config(world, MSIX + 2, 2, 0)
        assert kinds(world) == ["msix", "none"]

    play(scenario)


def test_the_guests_table_takes_vectors_into_use_and_releases_them(play: Any) -> None:
    """Section 4, MSI-X, by the guest's own writes: enable, function mask, and each vector's mask."""

    async def scenario(world: Any) -> None:
        rig = await add(world)
        await config(world, MSIX + 2, 2, ENABLE | MASK_ALL)
        assert [armed(r) for r in rig.log] == [(0, (False,))], "enabled with no vector, as the guest's is"
        rig.log.clear()
        await unmask(world, 2)
        assert rig.log == [], "all are masked together"
        await config(world, MSIX + 2, 2, ENABLE)
        assert rig.log[0].is_disable
        assert [armed(r) for r in rig.log[1:]] == [(0, (False, False, True))]
        assert [(e.kind, e.vector) for e in world.told(IrqModeChanged)][-1] == ("msix", 2)
        (bell,) = (await start(world, 2)).values()
        bell.rung()
        await bar(world, RAISE, 1 << 2)
        assert bell.rung() == 1
        rig.log.clear()
        await unmask(world, 2, masked=1)
        assert [armed(r) for r in rig.log] == [(2, (False,))]
        await bar(world, RAISE, 1 << 2)
        assert bell.rung() == 0
        assert await bar(world, PBA) == 1 << 2, "pending"
        told = len(world.told(IrqModeChanged))
        await unmask(world, 2)
        assert bell.rung() == 2, "the one that waited, and once for what may have been lost"
        assert await bar(world, PBA) == 0
        assert len(world.told(IrqModeChanged)) == told, "the hypervisor has its eventfd already"

    play(scenario)


def test_the_table_is_virtual_for_every_access_and_has_no_other_effect(play: Any) -> None:
    """Section 4: the table is the guest's; writes to it while it is masked change nothing but it."""

    async def scenario(world: Any) -> None:
        rig = await add(world)
        assert await bar(world, TABLE + 12) == 1, "not the ones the kernel would show"
        await bar(world, TABLE, 0xFEE0_1234_0000_0001, 8)
        assert await bar(world, TABLE, size=8) == 0xFEE0_1234_0000_0000
        reply = await world.command("region-read", device="n0", region="bar0", offset=TABLE - 4, length=24)
        assert reply.data == bytes(8) + (0xFEE0_1234).to_bytes(4, "little") + bytes(4) + b"\1\0\0\0" + bytes(4)
        await world.command("region-write", device="n0", region="bar0", offset=TABLE + 120, data="AAAAAAAAAAAAAAAA")
        assert await bar(world, TABLE + 124) == 0
        await bar(world, PBA, 0xFFFF_FFFF)
        assert (await bar(world, PBA), rig.log) == (0, [])
        await unmask(world, 1)
        assert rig.log == [], "MSI-X is not enabled"

    play(scenario)


def test_the_tables_pages_are_left_out_where_the_host_lets_nobody_map_them(play: Any) -> None:
    """Section 4, MSI-X: "Without the MSIX_MAPPABLE capability the pages of the table are left out"."""

    async def scenario(world: Any) -> None:
        world.rigs.msix = 8
        # Its table is in BAR 2, in the fifth page: PCI 3.0, 6.8.2, offset and BAR.
        table = (4 * PAGE_SIZE | 2).to_bytes(4, "little")
        place = {0xA0 + 4 + at: byte for at, byte in enumerate(table)}
        await world.add(prepare=lambda rig: rig.overlay.update(place))
        bar2 = await world.region("bar2")
        assert not bar2.msix_mappable
        assert [(a.offset, a.size) for a in bar2.areas] == [
            (0, 4 * PAGE_SIZE),
            (5 * PAGE_SIZE, bar2.size - 5 * PAGE_SIZE),
        ]
        # The guest's table shows there, and its neighbours are the device's memory.
        read = await world.command("region-read", device="n0", region="bar2", offset=4 * PAGE_SIZE, length=16)
        assert read.data == bytes(12) + b"\1\0\0\0"
        for offset in (4 * PAGE_SIZE - 4, 4 * PAGE_SIZE + 128, 5 * PAGE_SIZE):
            await world.command("region-write", device="n0", region="bar2", offset=offset, size=4, value=0xABCD)
            read = await world.command("region-read", device="n0", region="bar2", offset=offset, size=4)
            assert read.value == 0xABCD

    play(scenario)


def test_a_vector_that_cannot_be_had_leaves_its_mask_as_it_was(play: Any) -> None:
    async def scenario(world: Any) -> None:
        await add(world, granted=2)
        await config(world, MSIX + 2, 2, ENABLE)
        with pytest.raises(OperationFailed, match="2 are available"):
            await unmask(world, 5)
        assert await bar(world, TABLE + 5 * 16 + 12) == 1
        await unmask(world, 1)
        assert (await bells_of(world)) == [1]

    play(scenario)


def test_configuration_space_takes_any_width_and_alignment(play: Any) -> None:
    """Section 5: reads and writes of 1, 2, 4 or 8 bytes at any offset."""

    async def scenario(world: Any) -> None:
        await add(world)
        reply = await world.command("region-read", device="n0", region="config", offset=0, length=4096)
        for offset, size in ((1, 2), (0x11, 4), (0x3D, 8), (0xA1, 8), (4095, 1)):
            assert await config(world, offset, size) == int.from_bytes(reply.data[offset : offset + size], "little")
        await config(world, 0x0F, 8, 0xFFFF_FFFF_FFFF_FFFF)
        assert await config(world, 0x10, 4) == 0xFFFF_F000
        assert await config(world, 0x0E, 1) == 0
        with pytest.raises(InvalidArgument, match="out of range"):
            await config(world, 4095, 2)

    play(scenario)


def test_irq_route_moves_a_vectors_number(play: Any) -> None:
    async def scenario(world: Any) -> None:
        rig = await add(world)
        await start(world, 1, first_number=24)
        rig.log.clear()
        await world.command("irq-route", device="n0", index="msix", vector=1, number=30)
        assert (await world.irq("msix")).vectors[0].number == 30
        assert rig.log == [], "its eventfd is the same: KVM's routing is the hypervisor's"

    play(scenario)
