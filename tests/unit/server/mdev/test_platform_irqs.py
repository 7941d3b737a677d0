"""SET_IRQS as vfio-platform does it (drivers/vfio/platform/vfio_platform_irq.c), and messages as the RFC does them.

Rules are those of behaviour.md, section 7.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from itertools import product

import pytest

from vfiod.protocol.vfio import IrqAction, IrqData, IrqType, IrqTypeCap, MsiMessage, SetIrqs
from vfiod.server.mdev.platform_irqs import DOORBELL, FIRST_DATA, PlatformIrqs

from .conftest import Bell, Ground

MASK, UNMASK, TRIGGER = IrqAction.MASK, IrqAction.UNMASK, IrqAction.TRIGGER
LEVEL, EDGE, MSI = 0, 1, 2


@pytest.fixture
def irqs(ground: Ground) -> Iterator[PlatformIrqs]:
    made = PlatformIrqs(ground.host, level=1, edge=1, messages=8, granted=4)
    yield made
    made.close()
    ground.settle()


def boolean(action: IrqAction, index: int, *values: bool, start: int = 0) -> SetIrqs:
    return SetIrqs(index, start, len(values), action, IrqData.BOOL, (), values)


def bind(irqs: PlatformIrqs, index: int, *bells: Bell, start: int = 0) -> int:
    return irqs.set_irqs(SetIrqs.eventfds(TRIGGER, index, tuple(bell.number for bell in bells), start))


def refused(irqs: PlatformIrqs, request: SetIrqs, number: int) -> None:
    with pytest.raises(OSError) as caught:
        irqs.set_irqs(request)
    assert caught.value.errno == number


def test_info_is_vfio_platforms(irqs: PlatformIrqs) -> None:
    level, edge, msi = (irqs.info(index) for index in range(irqs.count))
    assert [(one.count, one.maskable, one.automasked, one.noresize) for one in (level, edge)] == [
        (1, True, True, False),
        (1, False, False, False),
    ]
    assert (msi.count, msi.type, msi.messages) == (8, IrqTypeCap(IrqType.MSI, 0), ())
    assert level.type is None and edge.type is None
    for index in (-1, 3):
        with pytest.raises(OSError):
            irqs.info(index)


def test_without_messages_there_is_no_index_for_them(ground: Ground) -> None:
    irqs = PlatformIrqs(ground.host, level=2, edge=0)
    assert irqs.count == 2
    with pytest.raises(OSError):
        irqs.info(2)


@pytest.mark.parametrize(
    "request_",
    [
        SetIrqs(3, 0, 1, TRIGGER),
        SetIrqs(-1, 0, 1, TRIGGER),
        SetIrqs(LEVEL, 1, 0, TRIGGER),
        SetIrqs(LEVEL, 0, 2, TRIGGER),
        SetIrqs(LEVEL, 0, 0, MASK),
        SetIrqs(EDGE, 0, 0, TRIGGER, IrqData.BOOL),
        SetIrqs(MSI, 8, 0, TRIGGER),
        SetIrqs(MSI, 7, 2, TRIGGER),
        SetIrqs(MSI, 0, 1 << 40, TRIGGER),
        SetIrqs(MSI, 0, 0, TRIGGER, IrqData.EVENTFD),
        SetIrqs(MSI, 0, 1, TRIGGER),
    ],
)
def test_what_is_einval(irqs: PlatformIrqs, request_: SetIrqs) -> None:
    refused(irqs, request_, errno.EINVAL)


def test_only_a_level_irq_can_be_masked(irqs: PlatformIrqs) -> None:
    for action, index in product((MASK, UNMASK), (EDGE, MSI)):
        refused(irqs, SetIrqs.now(action, index), errno.EINVAL)


# --- level ----------------------------------------------------------------------------------------------


def test_a_level_masks_itself_and_fires_again_while_the_line_is_up(irqs: PlatformIrqs, ground: Ground) -> None:
    bell = ground.bell()
    bind(irqs, LEVEL, bell)
    irqs.set_line(LEVEL, True)
    irqs.set_line(LEVEL, True)
    assert bell.rung() == 1
    irqs.set_irqs(SetIrqs.now(UNMASK, LEVEL))
    assert bell.rung() == 1, "the line is still up"
    irqs.set_line(LEVEL, False)
    irqs.set_irqs(SetIrqs.now(UNMASK, LEVEL))
    assert bell.rung() == 0
    irqs.set_line(LEVEL, True)
    assert bell.rung() == 1


def test_masked_by_the_user_it_holds(irqs: PlatformIrqs, ground: Ground) -> None:
    bell = ground.bell()
    bind(irqs, LEVEL, bell)
    irqs.set_irqs(boolean(MASK, LEVEL, False))
    irqs.set_irqs(boolean(MASK, LEVEL, True))
    irqs.set_line(LEVEL, True)
    assert bell.rung() == 0
    irqs.set_irqs(boolean(UNMASK, LEVEL, False))
    assert bell.rung() == 0
    irqs.set_irqs(boolean(UNMASK, LEVEL, True))
    assert bell.rung() == 1


def test_the_loopback_masks_as_a_real_one(irqs: PlatformIrqs, ground: Ground) -> None:
    bell = ground.bell()
    bind(irqs, LEVEL, bell)
    irqs.set_irqs(SetIrqs.now(TRIGGER, LEVEL))
    irqs.set_irqs(boolean(TRIGGER, LEVEL, True))
    assert bell.rung() == 1, "vfio_automasked_irq_handler does nothing while masked"
    irqs.set_irqs(SetIrqs.now(UNMASK, LEVEL))
    irqs.set_irqs(boolean(TRIGGER, LEVEL, False))
    assert bell.rung() == 0
    irqs.set_irqs(boolean(TRIGGER, LEVEL, True))
    assert bell.rung() == 1


def test_a_trigger_changed_leaves_the_mask(irqs: PlatformIrqs, ground: Ground) -> None:
    first, second = ground.bell(), ground.bell()
    bind(irqs, LEVEL, first)
    irqs.set_line(LEVEL, True)
    bind(irqs, LEVEL, second)
    irqs.set_irqs(SetIrqs.disable(LEVEL))
    bind(irqs, LEVEL, second)
    assert (first.rung(), second.rung()) == (1, 0)
    irqs.set_irqs(SetIrqs.now(UNMASK, LEVEL))
    assert second.rung() == 1


def test_a_line_that_is_up_fires_as_soon_as_there_is_a_trigger(irqs: PlatformIrqs, ground: Ground) -> None:
    bell = ground.bell()
    irqs.set_line(LEVEL, True)
    bind(irqs, LEVEL, bell)
    assert bell.rung() == 1


def test_eventfds_mask_and_unmask(irqs: PlatformIrqs, ground: Ground) -> None:
    bell, masks, unmasks = ground.bell(), ground.bell(), ground.bell()
    bind(irqs, LEVEL, bell)
    for action, one in ((MASK, masks), (UNMASK, unmasks)):
        irqs.set_irqs(SetIrqs.eventfds(action, LEVEL, (one.number,)))
        refused(irqs, SetIrqs.eventfds(action, LEVEL, (one.number,)), errno.EBUSY)
    masks.ring()
    ground.settle()
    irqs.set_line(LEVEL, True)
    assert bell.rung() == 0
    unmasks.ring()
    ground.settle()
    assert (bell.rung(), unmasks.rung()) == (1, 0)
    irqs.set_irqs(SetIrqs.eventfds(UNMASK, LEVEL, (-1,)))
    unmasks.ring()
    ground.settle()
    assert (bell.rung(), unmasks.rung()) == (0, 1)


def test_what_is_no_eventfd(irqs: PlatformIrqs, ground: Ground) -> None:
    bell = ground.bell()
    with open(os.devnull) as null:
        refused(irqs, SetIrqs.eventfds(TRIGGER, LEVEL, (null.fileno(),)), errno.EINVAL)
        refused(irqs, SetIrqs.eventfds(UNMASK, LEVEL, (null.fileno(),)), errno.EINVAL)
        bind(irqs, LEVEL, bell)
        refused(irqs, SetIrqs.eventfds(TRIGGER, LEVEL, (null.fileno(),)), errno.EINVAL)
    irqs.set_line(LEVEL, True)
    assert bell.rung() == 0, "vfio_set_trigger takes the old one away first"


# --- edge -----------------------------------------------------------------------------------------------


def test_edges_are_counted_not_masked(irqs: PlatformIrqs, ground: Ground) -> None:
    bell = ground.bell()
    bind(irqs, EDGE, bell)
    for _ in range(3):
        irqs.pulse(EDGE)
    irqs.set_irqs(SetIrqs.now(TRIGGER, EDGE))
    assert bell.rung() == 4


def test_edges_without_a_trigger_are_kept_as_one(irqs: PlatformIrqs, ground: Ground) -> None:
    bell = ground.bell()
    irqs.pulse(EDGE)
    irqs.pulse(EDGE)
    bind(irqs, EDGE, bell)
    assert bell.rung() == 1
    irqs.set_irqs(SetIrqs.disable(EDGE))
    irqs.pulse(EDGE)
    irqs.quiet()
    bind(irqs, EDGE, bell)
    assert bell.rung() == 0, "a reset forgets it"


# --- messages -------------------------------------------------------------------------------------------


def test_messages_are_told_once_granted_and_their_data_names_the_eventfd(irqs: PlatformIrqs, ground: Ground) -> None:
    bells = [ground.bell() for _ in range(3)]
    assert bind(irqs, MSI, *bells) == 0
    told = irqs.info(MSI).messages
    assert told == tuple(MsiMessage(DOORBELL, FIRST_DATA + at) for at in range(3))
    assert irqs.message(told[1].address, told[1].data)
    assert not irqs.message(told[1].address + 4, told[1].data)
    assert not irqs.message(told[1].address, told[2].data + 1)
    assert [bell.rung() for bell in bells] == [0, 1, 0]
    irqs.set_irqs(SetIrqs.now(TRIGGER, MSI, 0, 2))
    irqs.set_irqs(boolean(TRIGGER, MSI, False, True, start=1))
    assert [bell.rung() for bell in bells] == [1, 1, 1]


def test_more_than_can_be_had_says_how_many_and_changes_nothing(irqs: PlatformIrqs, ground: Ground) -> None:
    bells = [ground.bell() for _ in range(5)]
    assert bind(irqs, MSI, *bells) == 4
    assert irqs.info(MSI).messages == ()
    assert bind(irqs, MSI, *bells[:4]) == 0
    none = PlatformIrqs(ground.host, messages=2, granted=0)
    refused(none, SetIrqs.eventfds(TRIGGER, 1, (bells[0].number,)), errno.ENOSPC)


def test_a_failure_in_the_middle_undoes_the_block(irqs: PlatformIrqs, ground: Ground) -> None:
    bell = ground.bell()
    before = len(os.listdir("/proc/self/fd"))
    with open(os.devnull) as null:
        refused(irqs, SetIrqs.eventfds(TRIGGER, MSI, (bell.number, null.fileno(), bell.number)), errno.EINVAL)
    assert irqs.info(MSI).messages == ()
    assert not irqs.message(DOORBELL, FIRST_DATA)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_block_does_not_grow_and_is_released_whole(irqs: PlatformIrqs, ground: Ground) -> None:
    first, second = ground.bell(), ground.bell()
    bind(irqs, MSI, first, first)
    refused(irqs, SetIrqs.eventfds(TRIGGER, MSI, (second.number,), 2), errno.EINVAL)
    bind(irqs, MSI, second, start=1)
    assert irqs.message(DOORBELL, FIRST_DATA) and irqs.message(DOORBELL, FIRST_DATA + 1)
    assert (first.rung(), second.rung()) == (1, 1)
    irqs.set_irqs(SetIrqs.eventfds(TRIGGER, MSI, (-1,), 0))
    assert not irqs.message(DOORBELL, FIRST_DATA), "-1 takes one eventfd away"
    assert len(irqs.info(MSI).messages) == 2, "and not the message"
    irqs.set_irqs(SetIrqs.disable(MSI))
    assert irqs.info(MSI).messages == ()
    assert not irqs.message(DOORBELL, FIRST_DATA + 1)
    assert bind(irqs, MSI, first, first, first) == 0, "released, more can be asked for"


def test_close_lets_everything_go(irqs: PlatformIrqs, ground: Ground) -> None:
    before = len(os.listdir("/proc/self/fd"))
    bells = [ground.bell() for _ in range(4)]
    bind(irqs, LEVEL, bells[0])
    bind(irqs, EDGE, bells[1])
    bind(irqs, MSI, bells[2], bells[3])
    irqs.set_irqs(SetIrqs.eventfds(UNMASK, LEVEL, (bells[0].number,)))
    irqs.set_line(LEVEL, True)
    irqs.close()
    ground.settle()
    assert len(os.listdir("/proc/self/fd")) == before + len(bells)
    bind(irqs, LEVEL, bells[1])
    assert bells[1].rung() == 0, "a new user finds it quiet"
