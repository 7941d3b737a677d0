"""A device of another program, through everything: real vfiod, real program, real sockets, memory and eventfds."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vfiod.client.methods.values import VectorFds
from vfiod.client.spawn import own_server
from vfiod.client.sync import Client
from vfiod.protocol.errors import RemoteError

from .conftest import DMA, ERROR, EVENTFDS, MAPS, MISBEHAVE, PATIENCE, READ, SCRATCH, SETS, SIGNAL, Bench, rung

RAM = 0x1_0000_0000
VERSION = 0x564D_0001


def test_it_is_a_device_like_any_other(bench: Bench) -> None:
    bench.start()
    before = bench.server_fds()
    bench.add()
    [told] = bench.client.query_devices()
    assert (told.backend, told.host, told.vendor_id, told.device_id) == ("vfio-user", str(bench.path), 0x1B36, 0x42)
    assert bench.get(0) == VERSION
    bench.set(SCRATCH, 0x1234_5678)
    assert bench.get(SCRATCH) == 0x1234_5678
    data = bench.client.region_read(device="dev0", region="bar0", offset=0, length=4096).data
    assert isinstance(data, bytes)
    assert data[:4] == b"\x01\x00MV"
    bench.client.device_reset(id="dev0")
    assert bench.get(SCRATCH) == 0
    bench.client.device_del(id="dev0")
    assert bench.wait("DEVICE_DELETED").released
    assert bench.server_fds() == before


def test_more_than_its_transfer_limit_goes_in_pieces(bench: Bench) -> None:
    bench.start()  # it takes 4096 bytes in one message
    bench.add()
    data = bytes(range(256)) * 200
    bench.client.region_write(device="dev0", region="bar2", offset=16, data=data)
    assert bench.client.region_read(device="dev0", region="bar2", offset=16, length=len(data)).data == data


def test_its_memory_can_be_mapped_by_whoever_asks(bench: Bench) -> None:
    bench.start()
    bench.add()
    with bench.client.region_map(device="dev0", region="bar2") as reply:
        [first, second] = reply.areas
        assert [(first.offset, first.size), (second.offset, second.size)] == [(0x1000, 0x2000), (0x8000, 0x1000)]
        with mmap.mmap(reply.map_fd.number, 0x1000, offset=reply.offset + second.offset) as window:
            window[0:4] = b"\x2a\0\0\0"
    assert bench.get(0x8000, "bar2") == 42


@pytest.mark.parametrize("options", [(), ("--twin",)], ids=["one socket", "twin socket"])
def test_its_dma_reaches_guest_memory_and_nothing_else(bench: Bench, options: tuple[str, ...]) -> None:
    bench.start(*options)
    early = bench.memory(RAM, 0x2000)
    bench.add()
    late = bench.memory(RAM + 0x2000, 0x1000)
    assert bench.get(MAPS) == 2
    assert bench.dma(2, RAM + 0x1FF0, 0x20) == 0  # by message, across two mappings
    assert os.pread(early.number, 16, 0x1FF0) + os.pread(late.number, 16, 0) == bytes(range(32))
    assert bench.dma(3, RAM, 0x10) == 0  # by the fd it was given
    assert os.pread(early.number, 16, 0) == bytes(range(16))
    os.pwrite(late.number, b"\x11\x22\x33\x44", 0x100)
    assert bench.dma(1, RAM + 0x2100, 4) == 0
    assert bench.get(READ) == 0x4433_2211
    assert bench.dma(4, RAM, 8) == 0  # without a reply; what follows comes behind it
    assert bench.dma(2, RAM + 0x2FF8, 0x10) == errno.EFAULT
    assert bench.dma(1, RAM - 4, 4) == errno.EFAULT
    bench.client.dma_unmap(iova=RAM, size=0x2000)
    assert bench.get(MAPS) == 1
    assert bench.dma(1, RAM, 4) == errno.EFAULT
    assert bench.get(DMA) == 1


def test_readonly_memory_is_not_written(bench: Bench) -> None:
    bench.start()
    bench.add()
    memory = bench.memory(RAM, 0x1000, readonly=True)
    assert bench.dma(2, RAM, 4) == errno.EPERM
    assert os.pread(memory.number, 4, 0) == bytes(4)


def test_a_server_that_takes_no_fds_is_served_by_messages(bench: Bench) -> None:
    bench.start("--no-fds")
    memory = bench.memory(RAM, 0x1000)
    bench.add()
    assert bench.dma(3, RAM, 4) == errno.EOPNOTSUPP
    assert bench.dma(2, RAM, 4) == 0
    assert os.pread(memory.number, 4, 0) == bytes(range(4))
    with pytest.raises(RemoteError, match="intx"):
        bench.client.irq_start(device="dev0", eventfds=[VectorFds(vector=0, trigger=bench.eventfd())])


def test_its_mappings_are_as_many_as_it_says(bench: Bench) -> None:
    bench.start()  # it takes four
    bench.add()
    for place in range(4):
        bench.memory(RAM + place * 0x1000, 0x1000)
    with pytest.raises(RemoteError, match="takes 4 mappings") as caught:
        bench.memory(RAM + 0x9000, 0x1000)
    assert caught.value.errno == "ENOSPC"
    assert bench.get(MAPS) == 4


def test_message_interrupts_are_armed_in_batches_of_what_it_takes(bench: Bench) -> None:
    bench.start()  # it takes 8 fds in one message
    bench.add()
    sets = bench.get(SETS)
    triggers = [bench.eventfd() for _ in range(20)]
    bench.client.irq_start(
        device="dev0", index="msix", eventfds=[VectorFds(vector=v, trigger=t) for v, t in enumerate(triggers)]
    )
    assert bench.get(SETS) - sets == 3
    for vector in (0, 7, 8, 19):
        bench.set(SIGNAL, vector)
        assert rung(triggers[vector]) == 1
    with_notices = bench.get(EVENTFDS)
    bench.client.irq_stop(device="dev0")
    assert with_notices - bench.get(EVENTFDS) == 20


def test_an_intx_is_relayed_and_completed(bench: Bench) -> None:
    bench.start()
    bench.add()
    trigger = bench.eventfd()
    bench.client.irq_start(device="dev0", mode="relayed", eventfds=[VectorFds(vector=0, trigger=trigger)])
    bench.set(SIGNAL, 0x8000_0000)
    assert rung(trigger) == 1
    assert bench.wait("IRQ").fired == 1
    bench.client.irq_eoi(device="dev0", index="intx")
    bench.client.irq_mask(device="dev0", index="intx")
    bench.client.irq_unmask(device="dev0", index="intx")
    bench.set(SIGNAL, 0x8000_0000)
    assert rung(trigger) == 1


def test_a_passed_socket_is_as_good_as_a_path(bench: Bench) -> None:
    with bench.start_connected() as sock:
        bench.add(socket_fd=sock)
    assert bench.get(0) == VERSION
    bench.client.device_del(id="dev0")
    bench.wait("DEVICE_DELETED")
    assert bench.programs[0].wait(60) == 0  # its client is gone


def test_what_device_add_refuses(bench: Bench) -> None:
    with pytest.raises(RemoteError, match="no server listens there") as caught:
        bench.add()
    assert caught.value.errno == "ENOENT"
    with pytest.raises(RemoteError, match="exclude each other"):
        bench.add(mdev="5c4a1e3e-0000-4000-8000-000000000bad")
    with pytest.raises(RemoteError, match="'vf-token' is for devices of the kernel"):
        bench.add(vf_token="5c4a1e3e-0000-4000-8000-000000000bad")
    with pytest.raises(RemoteError, match="'reconnect-ms' is for devices of a vfio-user server"):
        bench.client.device_add(driver="vfio-pci", host="0000:00:01.0", reconnect_ms=5)
    with bench.start_connected() as sock, pytest.raises(RemoteError, match="nobody can connect anew"):
        bench.add(socket_fd=sock, reconnect_ms=5)
    bench.start()
    told = bench.client.device_add(driver="vfio-pci", socket=str(bench.path), x_dry_run=True)
    assert told.possible
    assert bench.client.query_devices() == []


def test_errors_of_its_own_are_told(bench: Bench) -> None:
    bench.start()
    bench.add()
    assert bench.get(ERROR) == 0
    with pytest.raises(RemoteError, match=r"VFIO_USER_REGION_WRITE on .* failed with ENOTCONN: it hung up"):
        bench.set(MISBEHAVE, 2)


def test_a_built_in_device_as_a_program_of_its_own(bench: Bench) -> None:
    command = [sys.executable, "-m", "vfiod.client.program", "mdev", "serve", "--type=primer-pci"]
    bench.programs.append(subprocess.Popen([*command, f"--socket-path={bench.path}"]))
    while not bench.path.exists():
        time.sleep(0.01)
    memory = bench.memory(RAM, 0x1000)
    bench.add()
    bench.client.region_write(device="dev0", region="config", offset=4, size=2, value=0b110)
    [told] = bench.client.query_devices()
    assert told.backend == "vfio-user"
    os.pwrite(memory.number, b"\x2a\0\0\0", 0x80)
    bench.set(0x20, 0x80)
    for offset, value in ((0x24, RAM >> 32), (0x28, 0), (0x2C, 4), (0x30, 1)):  # DMA into its own memory
        bench.set(offset, value)
    assert bench.get(0x34) == 1  # done, no fault
    assert bench.get(0, "bar2") == 42


def test_a_served_device_is_exported_again_and_used_by_another_vfiod(bench: Bench, tmp_path: Path) -> None:
    bench.start()
    door = str(bench.place / "door.sock")
    bench.add(export=door)
    (tmp_path / "other").mkdir()
    with (
        own_server(tmp_path / "other", ["--allow-connect"], name="vm2") as server,
        Client.connect(server.path, timeout=PATIENCE) as other,
    ):
        other.device_add(driver="vfio-pci", id="again", socket=door)
        assert other.region_read(device="again", region="bar0", offset=0, size=4).value == VERSION
        other.region_write(device="again", region="bar0", offset=SCRATCH, size=4, value=5)
        assert bench.get(SCRATCH) == 5
        trigger = bench.eventfd()
        other.irq_start(device="again", index="msix", eventfds=[VectorFds(vector=2, trigger=trigger)])
        other.region_write(device="again", region="bar0", offset=SIGNAL, size=4, value=2)
        assert rung(trigger) == 1
        other.device_reset(id="again")
        assert other.region_read(device="again", region="bar0", offset=SCRATCH, size=4).value == 0


def test_a_vfiod_that_would_wait_for_itself_gives_up(bench: Bench) -> None:
    bench.start()
    door = str(bench.place / "door.sock")
    bench.add(export=door)
    with pytest.raises(RemoteError, match="not answered within 200 ms"):
        bench.client.device_add(driver="vfio-pci", id="again", socket=door, x_msg_timeout=200)
    assert bench.get(0) == VERSION
