"""The built-in platform device through a real server process: messages, many interrupts, and what strangers try.

Rules are those of behaviour.md, section 7.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.integration.devices.conftest import PATIENCE

from vfiod.client import Client, FileDescriptor, RemoteError, VectorFds
from vfiod.client.spawn import OwnServer, own_server
from vfiod.protocol.fd import close_all

REGISTERS = 0
IRQ_RAISE, IRQ_ACK, MSI_RAISE, MSI_LOST, MSI_SOURCE = 0x10, 0x14, 0x18, 0x20, 0x400
LEVEL, EDGE, MSI = 0, 1, "x-msi"
MANY = 256


class Platform:
    """A server, a client, and a hypervisor's eventfds."""

    def __init__(self, server: OwnServer) -> None:
        self.server = server
        self.client = Client.connect(server.path, timeout=PATIENCE)
        self.eventfds: list[FileDescriptor] = []

    def add(self, parameters: dict[str, int] | None = None, name: str = "dev0") -> None:
        made = self.client.mdev_create(parent="platform", type="primer-platform", parameters=parameters or {})
        self.client.device_add(driver="vfio-platform", id=name, mdev=made.uuid)

    def store(self, register: int, value: int) -> None:
        self.client.region_write(device="dev0", region=REGISTERS, offset=register, size=4, value=value)

    def load(self, register: int) -> int:
        value = self.client.region_read(device="dev0", region=REGISTERS, offset=register, size=4).value
        assert isinstance(value, int)
        return value

    def eventfd(self) -> FileDescriptor:
        """Blocking: the tests wait for what it says, however long it takes."""
        self.eventfds.append(FileDescriptor(os.eventfd(0)))
        return self.eventfds[-1]

    def irq(self, name: str) -> Any:
        return next(irq for irq in self.client.query_irqs(device="dev0") if irq.name == name)

    def fds(self) -> list[str]:
        return sorted(f"{fd.owner} {fd.name}" for fd in self.client.query_fds() if fd.owner.startswith("device:"))


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Platform]:
    with own_server(tmp_path, [], name="vm1") as server:
        made = Platform(server)
        yield made
        close_all(made.eventfds)
        made.client.close()
        assert server.stop() == 0, server.messages()


def program(platform: Platform, source: int, address: int, data: int) -> None:
    at = MSI_SOURCE + 16 * source
    for offset, value in ((0, address & 0xFFFF_FFFF), (4, address >> 32), (8, data)):
        platform.store(at + offset, value)


def test_messages_from_grant_to_release(platform: Platform) -> None:
    platform.add({"messages": 4})
    before = platform.fds()
    bells = [platform.eventfd() for _ in range(3)]
    pairs = [VectorFds(vector=vector, trigger=bell) for vector, bell in enumerate(bells)]
    started = platform.client.irq_start(device="dev0", index=MSI, eventfds=pairs, first_number=100)
    assert [(irq.vector, irq.number, irq.mode) for irq in started.irqs] == [
        (0, 100, "direct"),
        (1, 101, "direct"),
        (2, 102, "direct"),
    ]
    told = platform.irq(MSI)
    assert (told.count, told.active) == (3, True), "the count is what was granted"
    assert [irq.x_message for irq in started.irqs] == told.x_messages
    for message in told.x_messages:
        program(platform, 3 - message.vector, message.address, message.data)
    platform.store(MSI_RAISE, 2)
    assert os.eventfd_read(bells[1].number) == 1, "source 2 has the message of vector 1"
    platform.client.irq_trigger(device="dev0", index=MSI, vector=2)
    assert os.eventfd_read(bells[2].number) == 1
    platform.client.irq_stop(device="dev0", index=MSI)
    platform.store(MSI_RAISE, 2)
    assert platform.load(MSI_LOST) == 1
    assert (platform.fds(), platform.irq(MSI).count) == (before, 4)


def test_a_short_host_and_eventfds_from_the_server(platform: Platform) -> None:
    platform.add({"messages": 8, "granted-messages": 2})
    with platform.client.irq_start(device="dev0", index=MSI, vectors=list(range(8))) as started:
        assert [irq.vector for irq in started.irqs] == [0, 1]
        platform.client.irq_trigger(device="dev0", index=MSI, vector=1)
        trigger = started.irqs[1].trigger_fd
        assert isinstance(trigger, FileDescriptor)
        os.set_blocking(trigger.number, True)
        assert os.eventfd_read(trigger.number) == 1
    assert platform.irq(MSI).count == 2


def test_the_machine_is_complete_without_messages(platform: Platform) -> None:
    """Nobody can take part of a block, so the notification leaves messages alone."""
    platform.add()
    with platform.client.irq_start() as started:
        assert [irq.index for irq in started.irqs] == [LEVEL, EDGE]
    platform.add(name="dev1")
    assert [irq.active for irq in platform.client.query_irqs(device="dev1")] == [True, True, False]


def test_removed_with_messages_granted(platform: Platform) -> None:
    platform.add()
    platform.client.irq_start(device="dev0", index=MSI, vectors=[0, 1]).close()
    with platform.client.events("DEVICE_DELETED") as deleted:
        platform.client.device_del(id="dev0")
        deleted.get(timeout=PATIENCE)
    assert platform.fds() == []


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"index": MSI, "vectors": [1]}, "block from vector 0"),
        ({"index": MSI, "vectors": [0, 2]}, "block from vector 0"),
        ({"index": MSI, "vectors": [0, 0]}, "twice"),
        ({"index": MSI, "vectors": [8]}, "no vector 8"),
        ({"index": MSI, "mode": "relayed"}, "direct"),
        ({"index": MSI, "routes": [{"index": EDGE, "number": 5}]}, "not being started"),
        ({"index": 3}, "no interrupt index"),
        ({"index": "x-none"}, "no interrupt index"),
        ({"index": "msi"}, "no interrupt index"),
        ({"index": -1}, "no interrupt index"),
    ],
)
def test_starts_that_cannot_be(platform: Platform, arguments: dict[str, Any], complaint: str) -> None:
    platform.add()
    before = platform.fds()
    with pytest.raises(RemoteError, match=complaint):
        platform.client.irq_start(device="dev0", **arguments)
    assert platform.fds() == before
    assert not platform.irq(MSI).active


@pytest.mark.parametrize(
    ("what", "complaint"),
    [
        (lambda client: client.irq_mask(device="dev0", index=MSI), "cannot be masked"),
        (lambda client: client.irq_unmask(device="dev0", index=MSI), "cannot be masked"),
        (lambda client: client.irq_trigger(device="dev0", index=MSI, vector=2), "not started"),
        (lambda client: client.irq_trigger(device="dev0", index=MSI, vector=99), "no vector 99"),
        (lambda client: client.irq_stop(device="dev0", index=MSI, vectors=[0]), "leave 'vectors' out"),
        (lambda client: client.irq_start(device="dev0", index=MSI, vectors=[0, 1, 2]), "does not grow"),
    ],
)
def test_what_a_granted_block_refuses(platform: Platform, what: Callable[[Client], Any], complaint: str) -> None:
    platform.add()
    platform.client.irq_start(device="dev0", index=MSI, vectors=[0, 1]).close()
    before = platform.fds()
    with pytest.raises(RemoteError, match=complaint):
        what(platform.client)
    assert (platform.fds(), platform.irq(MSI).count) == (before, 2)


def test_what_is_no_eventfd_is_refused(platform: Platform) -> None:
    platform.add()
    before = platform.fds()
    with FileDescriptor(os.open(os.devnull, os.O_RDWR)) as null, pytest.raises(RemoteError, match="eventfd"):
        pairs = [VectorFds(vector=0, trigger=platform.eventfd()), VectorFds(vector=1, trigger=null)]
        platform.client.irq_start(device="dev0", index=MSI, eventfds=pairs)
    with pytest.raises(RemoteError, match="resample"):
        pairs = [VectorFds(vector=0, trigger=platform.eventfd(), resample=platform.eventfd())]
        platform.client.irq_start(device="dev0", index=MSI, eventfds=pairs)
    assert platform.fds() == before


@pytest.mark.parametrize(
    "parameters", [{"level": -1}, {"edge": 1 << 40}, {"messages": "many"}, {"memory": 1}, {"nothing": 1}]
)
def test_devices_that_cannot_be_made(platform: Platform, parameters: dict[str, Any]) -> None:
    with pytest.raises(RemoteError, match=next(iter(parameters))):
        platform.client.mdev_create(parent="platform", type="primer-platform", parameters=parameters)
    assert platform.client.query_machine().mdevs == []


def test_256_interrupts_of_a_device_each_arrives_at_its_own_eventfd(platform: Platform) -> None:
    platform.add({"level": 0, "edge": MANY, "messages": 0})
    bells = [platform.eventfd() for _ in range(MANY)]
    for index, bell in enumerate(bells):
        pairs = [VectorFds(vector=0, trigger=bell)]
        platform.client.irq_start(device="dev0", index=index, mode="relayed", eventfds=pairs)
    for index in range(MANY):
        platform.store(IRQ_RAISE, index)
    # One is active at a time; each access completes it, and the next comes.
    for _ in range(MANY):
        platform.load(MSI_LOST)
    assert [os.eventfd_read(bell.number) for bell in bells] == [1] * MANY
    told = platform.client.query_irqs(device="dev0")
    assert [irq.delivered for irq in told] == [1] * MANY
    assert {irq.vectors[0].state for irq in told} == {"inactive"}


def test_ten_thousand_interrupts_and_none_is_lost(platform: Platform) -> None:
    """Each is completed by a resample eventfd; vfiod hears the device, the consumer, and loses neither."""
    platform.add()
    trigger, resample = platform.eventfd(), platform.eventfd()
    pairs = [VectorFds(vector=0, trigger=trigger, resample=resample)]
    platform.client.irq_start(device="dev0", index=LEVEL, mode="relayed", eventfds=pairs)
    platform.store(IRQ_RAISE, LEVEL)
    for _ in range(10_000):  # never acknowledged: each EOI unmasks a line that is up, and it comes again
        assert os.eventfd_read(trigger.number) == 1
        os.eventfd_write(resample.number, 1)
    assert os.eventfd_read(trigger.number) == 1
    platform.store(IRQ_ACK, LEVEL)
    told = platform.irq("irq0")
    assert (told.fired, told.delivered) == (10_001, 10_001)
