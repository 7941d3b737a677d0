"""Servers that hang, die, lie and come back."""

from __future__ import annotations

import os
import socket
import threading

import pytest
from tests.integration.exports.hypervisor import Hypervisor, eventfd, memfd

from vfiod.client.methods.values import VectorFds
from vfiod.client.sync import Client
from vfiod.protocol.errors import RemoteError

from .conftest import MAPS, MISBEHAVE, PATIENCE, SCRATCH, SIGNAL, Bench, rung

RAM = 0x1000_0000


def test_a_server_that_stops_answering_stops_nobody_else(bench: Bench) -> None:
    bench.start()
    bench.add(x_msg_timeout=500)
    bench.set(MISBEHAVE, 1)
    answers: list[str] = []

    def ask() -> None:
        with Client.connect(bench.server.path, timeout=PATIENCE) as other:
            try:
                other.region_read(device="dev0", region="bar0", offset=0, size=4)
            except RemoteError as error:
                answers.append(str(error.errno))

    asking = threading.Thread(target=ask)
    asking.start()
    # Meanwhile everything else goes on: these would wait behind it if the loop did.
    for _ in range(20):
        assert bench.client.query_devices()[0].id == "dev0"
    asking.join(PATIENCE)
    assert answers == ["ETIMEDOUT"]
    # It is known now: nothing waits for it again, and it can be removed.
    with pytest.raises(RemoteError, match="nor said anything since"):
        bench.get(0)
    bench.client.device_del(id="dev0")
    bench.wait("DEVICE_DELETED")


@pytest.mark.parametrize(("how", "why"), [(2, "hung up"), (3, "9 bytes into a message"), (4, "speaks no vfio-user")])
def test_a_server_that_dies_is_told_and_its_device_stays(bench: Bench, how: int, why: str) -> None:
    bench.start()
    bench.add()
    with pytest.raises(RemoteError) as caught:
        bench.set(MISBEHAVE, how)
    assert caught.value.errno == "ENOTCONN"
    event = bench.wait("DEVICE_ERROR")
    assert event.device == "dev0"
    assert why in event.reason
    [told] = bench.client.query_devices()
    assert told.id == "dev0"
    with pytest.raises(RemoteError, match="the server is gone"):
        bench.get(0)
    bench.memory(RAM, 0x1000)  # guest memory is not its business any more
    bench.client.device_del(id="dev0")
    bench.wait("DEVICE_DELETED")


def test_a_server_that_comes_back_gets_everything_again(bench: Bench) -> None:
    program = bench.start()
    bench.memory(RAM, 0x1000)
    bench.add(reconnect_ms=20)
    trigger = bench.eventfd()
    bench.client.irq_start(device="dev0", index="msix", eventfds=[VectorFds(vector=3, trigger=trigger)])
    bench.set(SCRATCH, 7)
    for _ in range(2):
        program.kill()
        program.wait()
        assert "tries to reach it again every 20 ms" in bench.wait("DEVICE_ERROR").reason
        bench.client.dma_unmap(iova=RAM, size=0x1000)  # while it is away
        memory = bench.memory(RAM, 0x1000)
        program = bench.start()
        assert bench.wait("DEVICE_RECONNECTED").device == "dev0"
        assert bench.get(MAPS) == 1
        assert bench.dma(3, RAM, 8) == 0
        assert os.pread(memory.number, 8, 0) == bytes(range(8))
        bench.set(SIGNAL, 3)
        assert rung(trigger) == 1
        assert bench.get(SCRATCH) == 0  # that was the server's own


def test_a_server_that_comes_back_gets_configuration_space_again(bench: Bench) -> None:
    """BARs, command register, interrupt line, a capability's own register: as the device last showed them."""
    program = bench.start()
    bench.add(reconnect_ms=20)
    bench.config(0x10, 0xFFFF_FFFF, 4)  # a guest sizes a BAR, and then places it
    bench.config(0x10, 0xFEB0_0000, 4)
    bench.config(0x18, 0xFEB1_0000, 4)
    bench.config(0x3C, 11, 1)
    bench.config(0x50, 0x87, 1)
    bench.config(0x04, 0x0506, 2)
    for _ in range(2):
        before = bench.own_config(0, 0x100)
        assert before[0x10:0x1C] == bytes.fromhex("0000b0fe 00000000 0000b1fe")
        assert (before[0x3C], before[0x50], before[0x04:0x06]) == (11, 0x07, b"\x06\x05")
        program.kill()
        program.wait()
        bench.wait("DEVICE_ERROR")
        program = bench.start()
        assert bench.wait("DEVICE_RECONNECTED").remapped == ["bar2"]
        assert bench.own_config(0, 0x100) == before
    bench.client.device_reset(id="dev0")  # what a reset has undone is not brought back
    program.kill()
    program.wait()
    bench.wait("DEVICE_ERROR")
    program = bench.start()
    bench.wait("DEVICE_RECONNECTED")
    after = bench.own_config(0, 0x100)
    assert (after[0x50], after[0x10:0x14], after[0x04:0x06]) == (0, before[0x10:0x14], before[0x04:0x06])


def test_what_was_mapped_of_a_former_server_is_told(bench: Bench) -> None:
    """Another file: who mapped it is told, a hypervisor hung up on. The same file: nobody notices."""
    path = bench.place / "bar2"
    program = bench.start(f"--memory={path}")
    bench.add(reconnect_ms=20)
    door = bench.place / "door.sock"
    bench.client.device_export_add(id="e0", type="vfio-user", device="dev0", path=str(door))
    with Hypervisor(door) as hypervisor, eventfd() as error:
        _, fd = hypervisor.region(2)
        assert fd is not None
        fd.close()
        hypervisor.trigger(3, error.number)
        program.kill()
        program.wait()
        bench.wait("DEVICE_ERROR")
        program = bench.start(f"--memory={path}")
        assert bench.wait("DEVICE_RECONNECTED").remapped == []
        assert hypervisor.read(0, 0) == 0x564D_0001, "it goes on"
        program.kill()
        program.wait()
        bench.wait("DEVICE_ERROR")
        bench.start()
        assert "attach again" in bench.wait("DEVICE_EXPORT_DETACHED").reason
        assert rung(error) == 1
        assert hypervisor.gone()
    with Hypervisor(door) as following:
        assert following.read(0, 0) == 0x564D_0001


def test_a_hypervisor_that_maps_nothing_keeps_its_device(bench: Bench) -> None:
    """Sections 2 and 3: while its program is away it reads as all ones; its memory is mapped again when it is back."""
    program = bench.start()
    bench.add(reconnect_ms=20, share_fd=False)
    door = bench.place / "door.sock"
    bench.client.device_export_add(id="e0", type="vfio-user", device="dev0", path=str(door))
    with Hypervisor(door) as hypervisor, eventfd() as vector, memfd(1 << 16) as memory:
        hypervisor.map(RAM, 1 << 16, memory.number)
        hypervisor.trigger(2, vector.number)
        hypervisor.master()
        program.kill()
        program.wait()
        bench.wait("DEVICE_ERROR")
        assert hypervisor.read(0, 0) == 0xFFFF_FFFF, "as of a device that was pulled out"
        bench.start()
        bench.wait("DEVICE_RECONNECTED")
        assert hypervisor.read(0, 0x104, 2) & 4, "it masters its bus again"
        hypervisor.write(0, 0x08, RAM, 8)
        hypervisor.write(0, 0x10, 8)
        hypervisor.write(0, 0x14, 3)
        assert os.pread(memory.number, 8, 0) == bytes(range(8))
        hypervisor.write(0, SIGNAL, 0)
        assert rung(vector) == 1


def test_another_device_at_the_same_place_is_refused(bench: Bench) -> None:
    program = bench.start()
    bench.add(reconnect_ms=20)
    program.kill()
    bench.wait("DEVICE_ERROR")
    bench.start("--id=0x43")
    assert "Another device answers" in bench.wait("DEVICE_ERROR").reason
    with pytest.raises(RemoteError, match="another device answers"):
        bench.get(0)
    bench.client.device_del(id="dev0")
    bench.wait("DEVICE_DELETED")


def test_vfiod_ends_while_it_tries_to_connect_again(bench: Bench) -> None:
    program = bench.start()
    bench.add(reconnect_ms=5)
    program.kill()
    bench.wait("DEVICE_ERROR")


def test_a_server_that_answers_each_question_just_in_time_is_given_up(bench: Bench) -> None:
    """It is asked some thirty times: without a bound of the whole, it holds up every other change as often."""
    bench.start("--slow=0.15")
    # On a machine that is busy, one answer may be late as well.
    with pytest.raises(RemoteError, match=r"4 times x-msg-timeout were not enough|not answered within") as refused:
        bench.add(x_msg_timeout=600)
    assert refused.value.errno == "ETIMEDOUT"
    assert bench.client.query_devices() == []


def test_a_socket_on_which_nobody_speaks_vfio_user(bench: Bench) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(RemoteError, match="not answered within 100 ms"):
        bench.add(socket_fd=theirs, x_msg_timeout=100)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        with pytest.raises(RemoteError, match="speaks no vfio-user"):
            bench.add(socket_fd=theirs)
    reader, writer = os.pipe()
    os.close(writer)
    with os.fdopen(reader) as pipe, pytest.raises(RemoteError, match="socket"):
        bench.add(socket_fd=pipe.fileno())
    assert bench.client.query_devices() == []
