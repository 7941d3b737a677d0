"""A hypervisor attaches to an export of the built-in device, and does all a hypervisor does.

Rules are those of behaviour.md, sections 2 and 5.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

from vfiod.protocol import vfio, vfio_user
from vfiod.protocol.catalogue.words import UNSET

from .conftest import Server, eventually
from .hypervisor import PATIENCE, eventfd, mapped, memfd, rung, silent


def test_the_order_of_qemu(server: Server) -> None:
    """VERSION, DMA_MAP, GET_INFO, REGION_INFO and IRQ_INFO, config, SET_IRQS, registers."""
    hypervisor = server.attach(server.primer())
    assert server.event("DEVICE_EXPORT_ATTACHED")["pid"] == os.getpid()
    with memfd(1 << 20, b"from the guest") as memory:
        hypervisor.map(0, 1 << 20, memory.number)
    info = hypervisor.device()
    assert (info.num_regions, info.num_irqs) == (9, 5)
    assert info.flags == vfio.DeviceFlags.PCI | vfio.DeviceFlags.RESET
    regions = [hypervisor.region(index) for index in range(8)]
    assert [one.size for one, _ in regions] == [4096, 0, 1 << 20, 0, 0, 0, 0, 4096]
    assert [fd is not None for _, fd in regions] == [False, False, True, False, False, False, False, False]
    assert [hypervisor.irq(index).count for index in range(5)] == [1, 4, 8, 1, 1]
    assert hypervisor.read(7, 0, 2) == 0x1234
    with eventfd() as trigger:
        hypervisor.trigger(1, trigger.number)
        hypervisor.master()
        hypervisor.write(0, 0x14, 1)
        assert rung(trigger) == 1
        hypervisor.write(0, 0x18, 1)
    assert hypervisor.dma(0, 64, 14, 1) == 1
    bar, fd = regions[2]
    assert fd is not None
    with fd, mapped(fd, bar, bar.areas[0]) as view:
        assert view[64:78] == b"from the guest"
    [export] = server.client.query_device_exports()
    assert (export.state, export.attached, export.device) == ("attached", 1, "dev0")
    assert export.client is not UNSET
    assert export.client.mapped_bytes == 1 << 20
    assert export.client.errors == 0


def test_config_space_is_the_guests(server: Server) -> None:
    hypervisor = server.attach(server.primer())
    hypervisor.write(7, 0x10, 0xFFFF_FFFF)
    assert hypervisor.read(7, 0x10) == 0xFFFF_F000, "BAR0 has 4 KiB"
    hypervisor.write(7, 0x10, 0xFEBF_1000)
    assert hypervisor.read(7, 0x10) == 0xFEBF_1000
    assert len(hypervisor.bytes(7, 0, 256)) == 256


def test_posted_writes_and_many_at_once_are_done_in_order(server: Server) -> None:
    hypervisor = server.attach(server.primer())
    for value in range(1, 200):
        hypervisor.post(0, 4, value)
    assert hypervisor.read(0, 4) == 0xFFFF_FFFF ^ 199
    writes = tuple(vfio_user.OneWrite(0, 8, number.to_bytes(4, "little")) for number in (9, 16, 25, 144))
    reply = hypervisor.do(vfio_user.WriteMulti(writes))
    assert reply == vfio_user.WroteMulti(4)
    assert hypervisor.read(0, 8) == 12
    reply = hypervisor.do(vfio_user.WriteMulti((*writes[:2], vfio_user.OneWrite(0, 4095, b"1234"))))
    assert reply == vfio_user.WroteMulti(2)
    assert hypervisor.read(0, 8) == 4


def test_intx_is_masked_until_the_client_unmasks_it(server: Server) -> None:
    hypervisor = server.attach(server.primer())
    now = vfio.SetIrqs.now
    with eventfd() as trigger, eventfd() as resample:
        hypervisor.trigger(0, trigger.number)
        hypervisor.write(0, 0x14, 1)
        assert rung(trigger) == 1
        hypervisor.irqs(now(vfio.IrqAction.UNMASK, 0))
        assert rung(trigger) == 1, "the line is still up"
        hypervisor.irqs(vfio.SetIrqs.eventfds(vfio.IrqAction.UNMASK, 0, (resample.number,)))
        assert rung(trigger) == 1, "setting it up anew unmasks"
        os.eventfd_write(resample.number, 1)
        assert rung(trigger) == 1
        hypervisor.write(0, 0x18, 1)
        os.eventfd_write(resample.number, 1)
        hypervisor.write(0, 0x14, 1)
        assert rung(trigger) == 1, "unmasked by the eventfd"
        hypervisor.write(0, 0x18, 1)
        hypervisor.irqs(now(vfio.IrqAction.MASK, 0))
        hypervisor.write(0, 0x14, 1)
        assert silent(trigger)
        hypervisor.irqs(now(vfio.IrqAction.UNMASK, 0))
        assert rung(trigger) == 1
        hypervisor.irqs(vfio.SetIrqs.disable(0))
        assert all(not one.vectors for one in server.client.query_irqs(device="dev0"))


def test_config_writes_of_an_attached_client_change_no_interrupt(server: Server) -> None:
    hypervisor = server.attach(server.primer())
    capability = hypervisor.read(7, 0x34, 1)
    while hypervisor.read(7, capability, 1) != 5:
        capability = hypervisor.read(7, capability + 1, 1)
    hypervisor.write(7, capability + 2, 1, 2)
    assert all(not one.active for one in server.client.query_irqs(device="dev0"))
    with eventfd() as first, eventfd() as second:
        hypervisor.trigger(1, first.number, second.number)
        [msi] = [one for one in server.client.query_irqs(device="dev0") if one.active]
        assert (msi.name, [vector.mode for vector in msi.vectors]) == ("msi", ["direct", "direct"])
        hypervisor.trigger(1, -1, start=1)
        [msi] = [one for one in server.client.query_irqs(device="dev0") if one.active]
        assert [vector.vector for vector in msi.vectors] == [0]


def test_msix_without_vectors_stays_enabled_and_grows(server: Server) -> None:
    hypervisor = server.attach(server.primer(parameters={"msix-vectors": 64}))
    assert hypervisor.irq(2).count == 64
    hypervisor.trigger(2, -1)
    fds = [eventfd() for _ in range(40)]
    hypervisor.trigger(2, *(fd.number for fd in fds))
    hypervisor.master()
    for fd in fds:
        rung(fd) if not silent(fd) else None  # growing signals what may have been lost
    hypervisor.write(0, 0x14, 1 << 30)
    assert rung(fds[30]) == 1
    hypervisor.irqs(vfio.SetIrqs.disable(2))
    for fd in fds:
        fd.close()


def test_reset_keeps_interrupts_and_puts_registers_back(server: Server) -> None:
    hypervisor = server.attach(server.primer())
    with eventfd() as trigger:
        hypervisor.trigger(1, trigger.number)
        hypervisor.write(0, 4, 7)
        hypervisor.reset()
        assert hypervisor.read(0, 4) == 0xFFFF_FFFF
        hypervisor.master()
        hypervisor.write(0, 0x14, 1)
        assert rung(trigger) == 1


def test_dma_by_messages_where_memory_came_without_a_file(server: Server) -> None:
    hypervisor = server.attach(server.primer())
    hypervisor.map(0x10000, 0x2000)
    hypervisor.memory[0x10000] = bytearray(os.urandom(0x2000))
    hypervisor.master()
    assert hypervisor.dma(0x10800, 0, 0x1000, 1) == 1
    assert hypervisor.bytes(2, 0, 0x1000) == bytes(hypervisor.memory[0x10000][0x800:0x1800])
    assert hypervisor.dma(0x10000, 0, 0x1000, 3) == 1
    assert hypervisor.memory[0x10000][:0x1000] == hypervisor.bytes(2, 0, 0x1000)
    hypervisor.memory.clear()
    assert hypervisor.dma(0x10000, 0, 0x1000, 1) == 0x202, "the client refuses: a fault"
    hypervisor.unmap(0x10000, 0x2000)
    asked = len(hypervisor.asked)
    assert hypervisor.dma(0x10000, 0, 0x1000, 1) == 0x202
    assert len(hypervisor.asked) == asked


def test_dma_to_the_little_that_came_without_a_file(server: Server) -> None:
    """However much is shared: the write that starts such a transfer waits for it, and other accesses do not change."""
    hypervisor = server.attach(server.primer())
    with memfd(8 << 20, b"shared") as memory:
        hypervisor.map(0, 8 << 20, memory.number)
    hypervisor.map(0x1000_0000, 0x1000)
    own = hypervisor.memory[0x1000_0000] = bytearray(b"not shared".ljust(0x1000, b"."))
    hypervisor.master()
    assert hypervisor.dma(0x1000_0000, 0, 10, 1) == 1
    assert hypervisor.bytes(2, 0, 10) == b"not shared"
    assert len(hypervisor.asked) == 1
    assert hypervisor.dma(0, 64, 6, 1) == 1
    assert hypervisor.bytes(2, 64, 6) == b"shared"
    assert len(hypervisor.asked) == 1, "what is shared is not asked for"
    hypervisor.write(0, 0x20, 0x1000_0100, 8)
    hypervisor.post(0, 0x30, 3)  # to the guest, and nobody waits for the reply
    assert hypervisor.read(0, 0x34) == 1, "what comes later sees it done"
    assert bytes(own[0x100:0x106]) == b"shared"
    one = vfio_user.OneWrite(0, 0x30, (1).to_bytes(4, "little"))
    assert hypervisor.do(vfio_user.WriteMulti((one, one))) == vfio_user.WroteMulti(2)
    assert len(hypervisor.asked) == 4
    [export] = server.client.query_device_exports()
    assert export.client is not UNSET
    assert export.client.unreachable_bytes == 0, "all of it can be reached, one way or the other"


def test_the_monitor_may_start_such_a_transfer_too(server: Server) -> None:
    hypervisor = server.attach(server.primer())
    hypervisor.map(0, 0x1000)
    hypervisor.memory[0] = bytearray(b"asked for".ljust(0x1000, b"."))
    hypervisor.master()
    hypervisor.write(0, 0x2C, 9)
    with ThreadPoolExecutor(1) as elsewhere:
        write = elsewhere.submit(
            server.client.region_write, device="dev0", region="bar0", offset=0x30, size=4, value=1, force=True
        )
        for request in hypervisor.receive():
            assert isinstance(request, vfio_user.Request)
            hypervisor.serve(request)
        write.result(PATIENCE)
    assert hypervisor.read(0, 0x34) == 1
    assert hypervisor.bytes(2, 0, 9) == b"asked for"


def test_a_mapping_may_be_read_only(server: Server) -> None:
    hypervisor = server.attach(server.primer())
    with memfd(1 << 16) as memory:
        hypervisor.map(0, 1 << 16, memory.number, flags=1)
    hypervisor.master()
    assert hypervisor.dma(0, 0, 64, 1) == 1
    assert hypervisor.dma(0, 0, 64, 3) == 0x302


def test_a_doorbell_is_rung_by_an_eventfd(server: Server) -> None:
    hypervisor = server.attach(server.primer(parameters={"doorbell": True}))
    before = server.open_fds()
    short = hypervisor.do(vfio_user.GetRegionIoFds(0))
    assert isinstance(short, vfio_user.RegionIoFds)
    assert (short.sub_regions, short.needed, hypervisor.fds) == ((), 56, [])
    reply = hypervisor.do(vfio_user.GetRegionIoFds(0, 56))
    assert isinstance(reply, vfio_user.RegionIoFds)
    [sub] = reply.sub_regions
    assert (sub.offset, sub.size, sub.fd_index, sub.type) == (0x14, 4, 0, vfio_user.IoFdType.IOEVENTFD)
    assert (sub.flags, sub.datamatch) == (vfio_user.IoFdFlags.DATAMATCH, 1)
    [bell] = hypervisor.fds
    eventually(lambda: server.open_fds() == before + 1)  # the eventfd; what was sent is closed
    with eventfd() as trigger:
        hypervisor.trigger(1, trigger.number)
        hypervisor.master()
        for _ in range(3):
            os.eventfd_write(bell.number, 1)
            assert rung(trigger) == 1
            assert hypervisor.read(0, 0x10) == 1
            hypervisor.write(0, 0x18, 1)
    assert isinstance(hypervisor.do(vfio_user.GetRegionIoFds(0, 4096)), vfio_user.RegionIoFds)
    [again] = hypervisor.fds
    os.eventfd_write(again.number, 1)
    eventually(lambda: hypervisor.read(0, 0x10) == 1)
    again.close()
    assert hypervisor.do(vfio_user.GetRegionIoFds(2, 56)) == vfio_user.RegionIoFds(2, (), 16, 16)
    assert hypervisor.fds == []
    hypervisor.close()
    server.event("DEVICE_EXPORT_DETACHED")
    os.eventfd_write(bell.number, 1)
    bell.close()
    eventually(lambda: server.open_fds() < before)


def test_what_is_not_there_is_refused_politely(server: Server) -> None:
    from .test_hostile import refuses

    hypervisor = server.attach(server.primer())
    refuses("ENOTTY", hypervisor, vfio_user.DeviceFeature(1, vfio.FeatureFlags.PROBE | vfio.FeatureFlags.GET))
    refuses("EOPNOTSUPP", hypervisor, vfio_user.MigrationRead(64))
    assert hypervisor.do(vfio_user.GetRegionIoFds(0)) == vfio_user.RegionIoFds(0, (), 16, 16)
    assert hypervisor.read(0, 0) == 0xF10D_0001
