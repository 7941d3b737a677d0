"""A server is replaced while it runs: sessions, devices, interrupts and sockets go on in the new process."""

from __future__ import annotations

import os
import threading
from typing import Final, Literal

from vfiod.client.methods.values import VectorFds
from vfiod.client.sync import Client
from vfiod.protocol.fd import FileDescriptor

from .conftest import PATIENCE, House, until

MODES: Final[tuple[Literal["relayed", "direct"], ...]] = ("relayed", "direct")


def primer(client: Client, id: str = "n0") -> str:
    uuid = client.mdev_create(parent="primer", type="primer-pci").uuid
    client.device_add(driver="vfio-pci", id=id, mdev=uuid)
    return uuid


def get(client: Client, offset: int, region: str = "bar0", id: str = "n0") -> int:
    value = client.region_read(device=id, region=region, offset=offset, size=4).value
    assert isinstance(value, int)
    return value


def put(client: Client, offset: int, value: int, region: str = "bar0", id: str = "n0") -> None:
    client.region_write(device=id, region=region, offset=offset, size=4, value=value)


def rung(bell: FileDescriptor) -> int:
    try:
        return os.eventfd_read(bell.number)
    except BlockingIOError:
        return 0


def test_a_session_goes_on_with_its_device_and_its_interrupts(house: House) -> None:
    first = house.first()
    with house.connect() as client, FileDescriptor(os.eventfd(0, os.EFD_NONBLOCK)) as bell:
        primer(client)
        put(client, 0x04, 0x1234)
        put(client, 4, 0x0006, "config")
        client.irq_start(device="n0", index="msix", eventfds=[VectorFds(vector=0, trigger=bell)], mode="relayed")
        put(client, 0x14, 1)
        until(lambda: rung(bell) > 0)
        second = house.next()
        assert first.ended() == 0
        # The same connection: nobody has noticed anything.
        assert get(client, 0x04) == 0x1234 ^ 0xFFFF_FFFF
        put(client, 0x14, 1)
        until(lambda: rung(bell) > 0)
        assert client.query_machine().sessions[0].pid == os.getpid()
        assert client.query_status().running is True
        assert second.process.poll() is None
        # Who comes later comes in, too, and the next one can take over from this one.
        with house.connect() as other:
            assert [one.id for one in other.query_devices()] == ["n0"]
        third = house.next()
        assert second.ended() == 0
        assert get(client, 0x04) == 0x1234 ^ 0xFFFF_FFFF
        client.device_del(id="n0")
        assert third.process.poll() is None


def test_under_load_no_command_fails_and_no_interrupt_is_lost(house: House) -> None:
    house.first()
    done = threading.Event()
    failures: list[BaseException] = []
    counts: list[int] = [0, 0]

    def load(number: int) -> None:
        try:
            with house.connect() as client:
                value = 0
                while not done.is_set():
                    value += 1
                    put(client, 0x04, value, id=f"n{number}")
                    assert get(client, 0x04, id=f"n{number}") == value ^ 0xFFFF_FFFF
                    put(client, 0x14, 1, id=f"n{number}")
                    counts[number] += 1
        except BaseException as error:
            failures.append(error)

    bells = [FileDescriptor(os.eventfd(0, os.EFD_NONBLOCK)) for _ in range(2)]
    with house.connect() as client, bells[0], bells[1]:
        for number, mode in enumerate(MODES):
            primer(client, f"n{number}")
            put(client, 4, 0x0006, "config", f"n{number}")
            eventfds = [VectorFds(vector=0, trigger=bells[number])]
            client.irq_start(device=f"n{number}", index="msix", eventfds=eventfds, mode=mode)
        threads = [threading.Thread(target=load, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for _ in range(3):
            before = list(counts)
            until(lambda before=before: failures != [] or all(a > b for a, b in zip(counts, before, strict=True)))  # type: ignore[misc]
            house.next()
        before = list(counts)
        until(lambda: failures != [] or all(a > b for a, b in zip(counts, before, strict=True)))
        done.set()
        for thread in threads:
            thread.join(PATIENCE)
        assert failures == []
        assert [one.process.poll() for one in house.servers] == [0, 0, 0, None]
        heard = [0, 0]

        def all_heard() -> bool:
            for number, bell in enumerate(bells):
                heard[number] += rung(bell)
            return heard == counts

        until(all_heard)
        client.quit()


def test_half_a_request_and_unread_replies_go_along(house: House) -> None:
    import socket

    house.first()
    with house.connect() as client:
        primer(client)
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(PATIENCE)
        raw.connect(str(house.qmp))
        lines = raw.makefile("rb")
        assert b"QMP" in lines.readline()
        raw.sendall(b'{"execute":"qmp_capabilities"}')
        assert lines.readline() == b'{"return":{}}\r\n'
        raw.sendall(b'{"execute":"query-status","id":1}{"execute":"query-na')
        assert b'"id":1' in lines.readline()
        house.next()
        raw.sendall(b'me","id":2}')
        assert lines.readline() == b'{"return":{"name":"vm"},"id":2}\r\n'


def test_events_go_on_with_their_numbers(house: House) -> None:
    house.first()
    with house.connect() as client:
        primer(client, "n0")
        before = client.query_machine().seq
        house.next()
        primer(client, "n1")
        assert client.query_machine().seq == before + 1


def test_named_fds_and_objects_stay(house: House) -> None:
    house.first()
    with house.connect() as client, FileDescriptor(os.memfd_create("guest")) as memory:
        os.ftruncate(memory.number, 1 << 20)
        client.getfd(fdname="spare", fd=memory)
        client.object_add(qom_type="memory-backend-fd", id="ram0", fd=memory, size=1 << 20)
        client.dma_map(iova=0, size=1 << 16, memory_backend="ram0")
        house.next()
        client.dma_map(iova=1 << 20, size=1 << 16, fd="spare")
        assert [one.iova for one in client.query_dma()] == [0, 1 << 20]
        client.dma_unmap(iova=0, size=1 << 16)
        client.object_del(id="ram0")


def test_another_vm_is_refused_and_the_running_one_goes_on(house: House) -> None:
    first = house.first()
    with house.connect() as client:
        primer(client)
        second = house.next("--name", "another")
        assert second.ended() == 1
        assert "It serves the VM 'vm', and this server was started for 'another'" in second.log()
        assert first.process.poll() is None
        assert get(client, 0x00) == 0xF10D_0001


def test_nobody_there_is_said(house: House) -> None:
    lonely = house.start("--take-over", f"unix:{house.hand}", "--allow-path", str(house.directory))
    assert lonely.ended() == 1
    assert "Nobody hands over at" in lonely.log()
