"""What is kept of a device that another program serves: eventfds, configuration space, what it has shown."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator

import pytest

from vfiod.protocol import vfio
from vfiod.protocol.errors import OperationFailed
from vfiod.protocol.fd import FileDescriptor, close_all
from vfiod.server.backends.vfio_user.armed import Armed
from vfiod.server.backends.vfio_user.kept_config import KeptConfig
from vfiod.server.backends.vfio_user.seen import Seen
from vfiod.server.state.fds import Given, Taken
from vfiod.server.state.machine import ArmedState

TRIGGER, MASK, UNMASK = vfio.IrqAction.TRIGGER, vfio.IrqAction.MASK, vfio.IrqAction.UNMASK
CONFIG, ROM = int(vfio.PciRegion.CONFIG), int(vfio.PciRegion.ROM)


@pytest.fixture
def bells() -> Iterator[list[FileDescriptor]]:
    made = [FileDescriptor(os.eventfd(0)) for _ in range(3)]
    yield made
    close_all(made)


def same(one: int, other: FileDescriptor) -> bool:
    """Whether two numbers are one eventfd."""
    os.eventfd_write(one, 1)
    return bool(select.select([other.number], [], [], 0)[0]) and os.eventfd_read(other.number) == 1


def taken_over(armed: Armed) -> Armed:
    """As another process has it."""
    given = Given()
    states, masked = armed.keep("device:d", given), armed.masked
    taken = Taken([FileDescriptor.duplicate_of(number) for _, number in given.fds])
    other = Armed()
    other.adopt(states, masked, taken)
    taken.close()
    return other


def test_what_was_armed_and_masked_is_told_again_by_another_process(bells: list[FileDescriptor]) -> None:
    armed = Armed()
    armed.note(vfio.SetIrqs.eventfds(TRIGGER, 2, (bells[0].number, -1, bells[1].number)))
    armed.note(vfio.SetIrqs.eventfds(UNMASK, 0, (bells[2].number,)))
    armed.note(vfio.SetIrqs.now(MASK, 2, 2))
    other = taken_over(armed)
    before, after = armed.requests(), other.requests()
    assert [(one.index, one.action, one.start, one.count, one.data) for one in after] == [
        (one.index, one.action, one.start, one.count, one.data) for one in before
    ]
    first = next(one for one in after if one.index == 2 and one.data is vfio.IrqData.EVENTFD)
    assert first.fds[1] == -1
    assert same(first.fds[0], bells[0]) and same(first.fds[2], bells[1])
    other.close()


def test_duplicates_last_until_the_server_is_told_otherwise(bells: list[FileDescriptor]) -> None:
    armed = Armed()
    armed.note(vfio.SetIrqs.eventfds(TRIGGER, 2, tuple(bell.number for bell in bells)))
    other = taken_over(armed)
    numbers = other.requests()[0].fds
    other.note(vfio.SetIrqs.eventfds(TRIGGER, 2, (bells[0].number,)))
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(numbers[0])
    os.fstat(numbers[1])
    other.note(vfio.SetIrqs.disable(2))
    for number in numbers:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(number)
    assert other.requests() == []
    os.fstat(bells[0].number)


def test_what_is_its_own_is_lent_with_its_owner(bells: list[FileDescriptor]) -> None:
    """A store knows by the owner when a file is closed; by a number it does not."""
    armed = Armed()
    armed.note(vfio.SetIrqs.eventfds(TRIGGER, 1, (bells[0].number,)))
    given = Given()
    assert armed.keep("device:d", given) == [ArmedState(index=1, action=int(TRIGGER), vector=0, fd=0)]
    assert given.fds == [("device:d/irq1.0", bells[0].number)]


def test_configuration_space_goes_along_in_runs() -> None:
    kept = KeptConfig()
    kept.adopt([(4, b"\x06\x05"), (0x10, b"\0\0\xb0\xfe")])
    assert kept.keep() == [(4, b"\x06\x05"), (0x10, b"\0\0\xb0\xfe")]
    assert kept.writes() == [(0x10, b"\0\0\xb0\xfe"), (4, b"\x06\x05")]


def test_what_takes_a_device_its_dma_holds_though_nobody_was_there() -> None:
    kept = KeptConfig()
    kept.adopt([(4, b"\x06\x05")])
    kept.refused(4, b"\x06\x00")
    assert kept.keep() == [(4, b"\x06\x05")], "what would give it DMA does not"
    kept.refused(0x10, b"\0\0\0\0")
    kept.refused(4, b"\0\0")
    assert kept.keep() == [(4, b"\x02\x05")]
    unknown = KeptConfig()
    unknown.refused(4, b"\0\0")
    assert unknown.keep() == [(4, b"\0")]


def test_what_was_seen_is_recalled_and_nothing_else() -> None:
    seen = Seen()
    seen.note(CONFIG, 0, bytes(range(64)))
    seen.note(CONFIG, 4, b"\x06\x05")
    seen.note(0, 0, b"a register")
    assert seen.recall(CONFIG, 2, 4, "d") == b"\x02\x03\x06\x05"
    for index, offset, length in ((CONFIG, 62, 4), (0, 0, 4)):
        with pytest.raises(OperationFailed, match="not kept of the former process"):
            seen.recall(index, offset, length, "d")
    assert seen.recall(ROM, 0, 4, "d") == bytes(4)
    seen.refused(ROM)
    with pytest.raises(OperationFailed):
        seen.recall(ROM, 0, 4, "d")
