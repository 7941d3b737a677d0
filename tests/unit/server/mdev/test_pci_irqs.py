"""SET_IRQS as vfio-pci does it (drivers/vfio/pci/vfio_pci_intrs.c).

Rules are those of behaviour.md, section 4.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from itertools import product

import pytest

from vfiod.protocol.vfio import IrqAction, IrqData, PciIrq, SetIrqs
from vfiod.server.mdev.pci_irqs import PciIrqs

from .conftest import Ground

MASK, UNMASK, TRIGGER = IrqAction.MASK, IrqAction.UNMASK, IrqAction.TRIGGER


@pytest.fixture
def irqs(ground: Ground) -> Iterator[PciIrqs]:
    made = PciIrqs(ground.host, intx=True, msi=8, err=True, granted=4)
    yield made
    made.close()
    ground.settle()


def boolean(action: IrqAction, index: int, *values: bool, start: int = 0) -> SetIrqs:
    return SetIrqs(index, start, len(values), action, IrqData.BOOL, (), values)


def refused(irqs: PciIrqs, request: SetIrqs, number: int) -> None:
    with pytest.raises(OSError) as caught:
        irqs.set_irqs(request)
    assert caught.value.errno == number


def test_info_is_vfio_pcis(irqs: PciIrqs, ground: Ground) -> None:
    told = {index: irqs.info(index) for index in range(5)}
    assert [told[i].count for i in range(5)] == [1, 8, 0, 1, 1]
    assert [told[i].maskable and told[i].automasked for i in range(5)] == [True, False, False, False, False]
    assert [told[i].noresize for i in range(5)] == [False, True, True, True, True]
    plain = PciIrqs(ground.host, err=False)
    with pytest.raises(OSError):
        plain.info(PciIrq.ERR)
    with pytest.raises(OSError):
        irqs.info(5)


# --- vfio_set_irqs_validate_and_prepare ---------------------------------------------------------------


@pytest.mark.parametrize(
    "request_",
    [
        SetIrqs(5, 0, 1, TRIGGER),
        SetIrqs(-1, 0, 1, TRIGGER),
        SetIrqs(PciIrq.INTX, 1, 0, TRIGGER),
        SetIrqs(PciIrq.INTX, 0, 2, TRIGGER),
        SetIrqs(PciIrq.MSI, 8, 0, TRIGGER),
        SetIrqs(PciIrq.MSI, 7, 2, TRIGGER),
        SetIrqs(PciIrq.MSI, -1, 1, TRIGGER),
        SetIrqs(PciIrq.MSIX, 0, 0, TRIGGER),
        SetIrqs(PciIrq.MSI, 0, 1 << 40, TRIGGER),
    ],
)
def test_a_range_outside_the_index_is_einval(irqs: PciIrqs, request_: SetIrqs) -> None:
    refused(irqs, request_, errno.EINVAL)


def test_only_intx_can_be_masked(irqs: PciIrqs) -> None:
    for action, index in product((MASK, UNMASK), (PciIrq.MSI, PciIrq.ERR, PciIrq.REQ)):
        refused(irqs, SetIrqs.now(action, index), errno.ENOTTY)


# --- INTx -----------------------------------------------------------------------------------------------


def test_intx_masks_itself_and_fires_again_while_the_line_is_up(irqs: PciIrqs, ground: Ground) -> None:
    bell = ground.bell()
    irqs.set_irqs(SetIrqs.eventfds(TRIGGER, PciIrq.INTX, (bell.number,)))
    irqs.set_line(True)
    irqs.set_line(True)
    assert bell.rung() == 1
    irqs.set_irqs(SetIrqs.now(UNMASK, PciIrq.INTX))
    assert bell.rung() == 1, "the line is still up"
    irqs.set_line(False)
    irqs.set_irqs(SetIrqs.now(UNMASK, PciIrq.INTX))
    assert bell.rung() == 0
    irqs.set_line(True)
    assert bell.rung() == 1


def test_intx_enabled_on_a_line_that_is_up_fires_at_once(irqs: PciIrqs, ground: Ground) -> None:
    bell = ground.bell()
    irqs.set_line(True)
    irqs.set_irqs(SetIrqs.eventfds(TRIGGER, PciIrq.INTX, (bell.number,)))
    assert bell.rung() == 1


def test_intx_masked_by_the_user_holds_until_unmasked(irqs: PciIrqs, ground: Ground) -> None:
    bell = ground.bell()
    irqs.set_irqs(SetIrqs.eventfds(TRIGGER, PciIrq.INTX, (bell.number,)))
    irqs.set_irqs(boolean(MASK, PciIrq.INTX, False))
    irqs.set_irqs(boolean(MASK, PciIrq.INTX, True))
    irqs.set_line(True)
    assert bell.rung() == 0
    irqs.set_irqs(boolean(UNMASK, PciIrq.INTX, False))
    assert bell.rung() == 0
    irqs.set_irqs(boolean(UNMASK, PciIrq.INTX, True))
    assert bell.rung() == 1


def test_intx_disable_in_the_command_register_holds_the_line_back(irqs: PciIrqs, ground: Ground) -> None:
    bell = ground.bell()
    irqs.set_irqs(SetIrqs.eventfds(TRIGGER, PciIrq.INTX, (bell.number,)))
    irqs.set_intx_disable(True)
    irqs.set_line(True)
    irqs.set_irqs(SetIrqs.now(TRIGGER, PciIrq.INTX))
    assert bell.rung() == 0
    irqs.set_intx_disable(False)
    assert bell.rung() == 1


def test_loopback_of_intx_does_not_mask(irqs: PciIrqs, ground: Ground) -> None:
    bell = ground.bell()
    refused(irqs, SetIrqs.now(TRIGGER, PciIrq.INTX), errno.EINVAL)
    irqs.set_irqs(SetIrqs.eventfds(TRIGGER, PciIrq.INTX, (bell.number,)))
    irqs.set_irqs(SetIrqs.now(TRIGGER, PciIrq.INTX))
    irqs.set_irqs(boolean(TRIGGER, PciIrq.INTX, True))
    irqs.set_irqs(boolean(TRIGGER, PciIrq.INTX, False))
    assert bell.rung() == 2
    irqs.set_line(True)
    assert bell.rung() == 1


def test_the_unmask_eventfd_unmasks(irqs: PciIrqs, ground: Ground) -> None:
    bell, resample = ground.bell(), ground.bell()
    irqs.set_irqs(SetIrqs.eventfds(TRIGGER, PciIrq.INTX, (bell.number,)))
    irqs.set_irqs(SetIrqs.eventfds(UNMASK, PciIrq.INTX, (resample.number,)))
    refused(irqs, SetIrqs.eventfds(UNMASK, PciIrq.INTX, (resample.number,)), errno.EBUSY)
    irqs.set_line(True)
    assert bell.rung() == 1
    resample.ring()
    ground.settle()
    assert bell.rung() == 1, "still up: it fires again"
    assert resample.rung() == 0, "the kernel takes the counter"
    irqs.set_line(False)
    irqs.set_irqs(SetIrqs.eventfds(UNMASK, PciIrq.INTX, (-1,)))
    irqs.set_irqs(SetIrqs.now(UNMASK, PciIrq.INTX))
    irqs.set_line(True)
    assert bell.rung() == 1
    resample.ring()
    ground.settle()
    assert bell.rung() == 0, "-1 took the eventfd away"
    assert resample.rung() == 1


def test_an_unmask_that_waits_in_the_eventfd_counts(irqs: PciIrqs, ground: Ground) -> None:
    # vfio_virqfd_enable: "Check if there was an event already pending on the eventfd before we registered".
    bell, resample = ground.bell(), ground.bell()
    irqs.set_line(True)
    irqs.set_irqs(SetIrqs.eventfds(TRIGGER, PciIrq.INTX, (bell.number,)))
    resample.ring()
    irqs.set_irqs(SetIrqs.eventfds(UNMASK, PciIrq.INTX, (resample.number,)))
    ground.settle()
    assert bell.rung() == 2


def test_intx_cannot_be_masked_by_an_eventfd(irqs: PciIrqs, ground: Ground) -> None:
    bell = ground.bell()
    irqs.set_irqs(SetIrqs.eventfds(TRIGGER, PciIrq.INTX, (bell.number,)))
    refused(irqs, SetIrqs.eventfds(MASK, PciIrq.INTX, (bell.number,)), errno.ENOTTY)


def test_a_trigger_of_minus_one_keeps_intx_enabled_and_silent(irqs: PciIrqs, ground: Ground) -> None:
    bell = ground.bell()
    irqs.set_irqs(SetIrqs.eventfds(TRIGGER, PciIrq.INTX, (bell.number,)))
    irqs.set_irqs(SetIrqs.eventfds(TRIGGER, PciIrq.INTX, (-1,)))
    assert irqs.kind is PciIrq.INTX
    irqs.set_line(True)
    assert bell.rung() == 0
    refused(irqs, SetIrqs.eventfds(TRIGGER, PciIrq.MSI, (bell.number,)), errno.EINVAL)


def test_mask_needs_intx_enabled(irqs: PciIrqs) -> None:
    for action in (MASK, UNMASK):
        refused(irqs, SetIrqs.now(action, PciIrq.INTX), errno.EINVAL)
    refused(irqs, SetIrqs.disable(PciIrq.INTX), errno.EINVAL)


def test_disabling_intx_lets_every_eventfd_go(irqs: PciIrqs, ground: Ground) -> None:
    before = len(os.listdir("/proc/self/fd"))
    bell, resample = ground.bell(), ground.bell()
    irqs.set_irqs(SetIrqs.eventfds(TRIGGER, PciIrq.INTX, (bell.number,)))
    irqs.set_irqs(SetIrqs.eventfds(UNMASK, PciIrq.INTX, (resample.number,)))
    irqs.set_irqs(SetIrqs.disable(PciIrq.INTX))
    assert irqs.kind is None
    assert len(os.listdir("/proc/self/fd")) == before + 2


# --- MSI --------------------------------------------------------------------------------------------------


def test_msi_vectors_fire_one_by_one(irqs: PciIrqs, ground: Ground) -> None:
    bells = [ground.bell() for _ in range(4)]
    assert irqs.set_irqs(SetIrqs.eventfds(TRIGGER, PciIrq.MSI, tuple(b.number for b in bells))) == 0
    assert (irqs.kind, irqs.vectors) == (PciIrq.MSI, 4)
    assert irqs.message(2)
    assert [b.rung() for b in bells] == [0, 0, 1, 0]
    irqs.set_irqs(boolean(TRIGGER, PciIrq.MSI, True, False, True, start=1))
    assert [b.rung() for b in bells] == [0, 1, 0, 1]
    irqs.set_irqs(SetIrqs.now(TRIGGER, PciIrq.MSI, 0, 4))
    assert [b.rung() for b in bells] == [1, 1, 1, 1]
    assert not irqs.message(4)


def test_fewer_vectors_are_told_and_nothing_changes(irqs: PciIrqs, ground: Ground) -> None:
    bell = ground.bell()
    assert irqs.set_irqs(SetIrqs.eventfds(TRIGGER, PciIrq.MSI, (bell.number,) * 8)) == 4
    assert irqs.kind is None
    assert irqs.set_irqs(SetIrqs.eventfds(TRIGGER, PciIrq.MSI, (bell.number,), start=4)) == 4
    assert irqs.set_irqs(SetIrqs.eventfds(TRIGGER, PciIrq.MSI, (bell.number,) * 4)) == 0


def test_msi_does_not_grow(irqs: PciIrqs, ground: Ground) -> None:
    bell = ground.bell()
    irqs.set_irqs(SetIrqs.eventfds(TRIGGER, PciIrq.MSI, (bell.number, -1)))
    refused(irqs, SetIrqs.eventfds(TRIGGER, PciIrq.MSI, (bell.number,), start=2), errno.EINVAL)
    irqs.set_irqs(SetIrqs.eventfds(TRIGGER, PciIrq.MSI, (bell.number,), start=1))
    assert irqs.message(1)


def test_vectors_without_a_trigger_are_skipped(irqs: PciIrqs, ground: Ground) -> None:
    bell = ground.bell()
    irqs.set_irqs(SetIrqs.eventfds(TRIGGER, PciIrq.MSI, (-1, bell.number, -1)))
    irqs.set_irqs(SetIrqs.now(TRIGGER, PciIrq.MSI, 0, 8))  # more than enabled: within the index, so skipped
    assert bell.rung() == 1
    assert not irqs.message(0)


def test_one_kind_at_a_time(irqs: PciIrqs, ground: Ground) -> None:
    bell = ground.bell()
    irqs.set_irqs(SetIrqs.eventfds(TRIGGER, PciIrq.MSI, (bell.number,)))
    refused(irqs, SetIrqs.eventfds(TRIGGER, PciIrq.INTX, (bell.number,)), errno.EINVAL)
    refused(irqs, SetIrqs.disable(PciIrq.INTX), errno.EINVAL)
    irqs.set_line(True)
    assert bell.rung() == 0, "with MSI the pin is quiet"
    irqs.set_irqs(SetIrqs.disable(PciIrq.MSI))
    assert (irqs.kind, irqs.vectors) == (None, 0)
    irqs.set_irqs(SetIrqs.eventfds(TRIGGER, PciIrq.INTX, (bell.number,)))
    assert bell.rung() == 1


def test_msi_not_enabled_cannot_be_triggered_or_disabled(irqs: PciIrqs) -> None:
    refused(irqs, SetIrqs.now(TRIGGER, PciIrq.MSI), errno.EINVAL)
    refused(irqs, SetIrqs.disable(PciIrq.MSI), errno.EINVAL)
    refused(irqs, SetIrqs.eventfds(TRIGGER, PciIrq.MSI, ()), errno.EINVAL)


# --- ERR and REQ: vfio_pci_set_ctx_trigger_single ------------------------------------------------------------


@pytest.mark.parametrize("index", [PciIrq.ERR, PciIrq.REQ])
def test_err_and_req(irqs: PciIrqs, ground: Ground, index: PciIrq) -> None:
    bell = ground.bell()
    fire = irqs.error if index is PciIrq.ERR else irqs.request
    assert not fire()
    refused(irqs, SetIrqs.now(TRIGGER, index), errno.EINVAL)
    irqs.set_irqs(SetIrqs.eventfds(TRIGGER, index, (bell.number,)))
    assert fire()
    irqs.set_irqs(SetIrqs.now(TRIGGER, index))
    irqs.set_irqs(boolean(TRIGGER, index, True))
    irqs.set_irqs(boolean(TRIGGER, index, False))
    assert bell.rung() == 3
    refused(irqs, boolean(TRIGGER, index), errno.EINVAL)
    irqs.set_irqs(SetIrqs.disable(index))
    assert not fire()
    irqs.set_irqs(SetIrqs.eventfds(TRIGGER, index, (bell.number,)))
    irqs.set_irqs(SetIrqs.eventfds(TRIGGER, index, (-1,)))
    assert not fire()


def test_err_and_req_are_beside_the_active_kind(irqs: PciIrqs, ground: Ground) -> None:
    bell = ground.bell()
    irqs.set_irqs(SetIrqs.eventfds(TRIGGER, PciIrq.REQ, (bell.number,)))
    assert irqs.kind is None
    irqs.set_irqs(SetIrqs.eventfds(TRIGGER, PciIrq.MSI, (bell.number,)))
    irqs.set_irqs(SetIrqs.disable(PciIrq.MSI))
    assert irqs.request()


# --- enemies ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [PciIrq.INTX, PciIrq.MSI, PciIrq.ERR, PciIrq.REQ])
def test_what_is_no_eventfd_is_refused_and_kept_by_nobody(irqs: PciIrqs, ground: Ground, index: PciIrq) -> None:
    reading, writing = os.pipe()
    before = len(os.listdir("/proc/self/fd"))
    refused(irqs, SetIrqs.eventfds(TRIGGER, index, (writing,)), errno.EINVAL)
    refused(irqs, SetIrqs.eventfds(TRIGGER, index, (10_000,)), errno.EBADF)
    assert len(os.listdir("/proc/self/fd")) == before
    assert irqs.kind is None
    os.close(reading)
    os.close(writing)


def test_a_bad_eventfd_among_good_ones_leaves_nothing(irqs: PciIrqs, ground: Ground) -> None:
    bell = ground.bell()
    before = len(os.listdir("/proc/self/fd"))
    refused(irqs, SetIrqs.eventfds(TRIGGER, PciIrq.MSI, (bell.number, 10_000)), errno.EBADF)
    assert irqs.kind is None
    assert len(os.listdir("/proc/self/fd")) == before
    irqs.set_irqs(SetIrqs.eventfds(TRIGGER, PciIrq.MSI, (bell.number, bell.number)))
    refused(irqs, SetIrqs.eventfds(TRIGGER, PciIrq.MSI, (bell.number, 10_000)), errno.EBADF)
    assert irqs.kind is PciIrq.MSI, "vfio_msi_set_block takes the block away, not the index"
    assert not irqs.message(0)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_full_blocking_eventfd_holds_nobody(irqs: PciIrqs, ground: Ground) -> None:
    bell = ground.bell()
    irqs.set_irqs(SetIrqs.eventfds(TRIGGER, PciIrq.MSI, (bell.number,)))
    os.eventfd_write(bell.number, 2**64 - 2)
    assert irqs.message(0)  # would never return
    assert bell.rung() == 2**64 - 2
    assert irqs.message(0)
    assert bell.rung() == 1


def test_the_users_own_fd_may_be_closed(irqs: PciIrqs, ground: Ground) -> None:
    bell = ground.bell()
    irqs.set_irqs(SetIrqs.eventfds(TRIGGER, PciIrq.MSI, (bell.number,)))
    kept = bell.fd.duplicate()
    bell.fd.close()
    assert irqs.message(0)
    assert os.eventfd_read(kept.number) == 1
    kept.close()
