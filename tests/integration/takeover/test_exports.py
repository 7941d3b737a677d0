"""A hypervisor stays attached to its device while the server behind it is replaced."""

from __future__ import annotations

import threading
from pathlib import Path

from tests.integration.exports.hypervisor import Hypervisor, eventfd, memfd, rung

from vfiod.client.sync import Client
from vfiod.protocol.catalogue.words import UNSET

from .conftest import PATIENCE, House, until
from .test_replaced import primer


def exported(house: House, client: Client) -> Path:
    primer(client)
    path = house.directory / "n0.sock"
    client.device_export_add(id="e0", type="vfio-user", device="n0", path=str(path))
    return path


def test_registers_dma_interrupts_and_memory_go_on(house: House) -> None:
    house.first()
    with house.connect() as client, eventfd() as trigger, eventfd() as asked:
        hypervisor = Hypervisor(exported(house, client))
        with memfd(1 << 20, b"from the guest") as memory:
            # One file in two pieces, and a piece without one, as QEMU maps RAM around its firmware.
            hypervisor.map(0, 1 << 20, memory.number)
            hypervisor.map(1 << 32, 1 << 16, memory.number)
            hypervisor.map(0xFFFC_0000, 0x4_0000)
        hypervisor.trigger(2, trigger.number)
        hypervisor.trigger(4, asked.number)
        hypervisor.master()
        hypervisor.write(7, 0x10, 0xFEBF_1000)
        house.next()
        # The same connection, the same eventfds, the same memory.
        hypervisor.write(0, 0x14, 1)
        assert rung(trigger) == 1
        assert hypervisor.dma(0, 64, 14, 1) == 1
        assert hypervisor.read(2, 64) == int.from_bytes(b"from", "little")
        assert hypervisor.read(7, 0x10) == 0xFEBF_1000
        [export] = client.query_device_exports()
        assert (export.state, export.attached, export.client is not UNSET) == ("attached", 1, True)
        assert export.client is not UNSET
        assert (export.client.mappings, export.client.errors) == (3, 0)
        hypervisor.unmap(0, 1 << 20)
        assert hypervisor.dma(0, 64, 14, 1) & 2, "what is unmapped is out of reach"
        # The next client comes in when this one has gone.
        hypervisor.close()
        until(lambda: client.query_device_exports()[0].state == "listening")
        again = Hypervisor(house.directory / "n0.sock")
        assert again.read(7, 0, 2) == 0x1234
        again.close()


def test_under_load_no_access_fails(house: House) -> None:
    house.first()
    done = threading.Event()
    failures: list[BaseException] = []
    counts = [0]
    with house.connect() as client, eventfd() as trigger:
        hypervisor = Hypervisor(exported(house, client))
        hypervisor.trigger(2, trigger.number)
        hypervisor.master()

        def load() -> None:
            try:
                while not done.is_set():
                    counts[0] += 1
                    hypervisor.write(0, 0x04, counts[0])
                    assert hypervisor.read(0, 0x04) == counts[0] ^ 0xFFFF_FFFF
                    hypervisor.write(0, 0x14, 1)
                    assert rung(trigger) == 1
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=load)
        thread.start()
        for _ in range(3):
            before = counts[0]
            until(lambda before=before: bool(failures) or counts[0] > before + 10)  # type: ignore[misc]
            house.next()
        before = counts[0]
        until(lambda: bool(failures) or counts[0] > before + 10)
        done.set()
        thread.join(PATIENCE)
        assert failures == []
        assert [one.process.poll() for one in house.servers] == [0, 0, 0, None]
        hypervisor.close()
