"""A host that runs out of interrupt vectors: one processor has about 200, and the disk alone could use 2,048.

Rules are those of behaviour.md, section 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from tests.lab.guest import nics
from tests.lab.guest.nics import WAYS, added, config, fired, set_config, triggers
from tests.lab.guest.vm import Vm
from tests.lab.topologies import SHORT_NVME, SHORT_NVME_VECTORS, XHCI_PORT, XHCI_VECTORS

from vfiod.protocol.errors import RemoteError

MACHINE = "short"

STEP = 64
"""Vectors that are asked for at once, at first: their eventfds fit one reply."""


@pytest.fixture(scope="module")
def vms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Iterator[Vm]]:
    running = nics.vfiods(tmp_path_factory)
    yield running
    running.close()


@pytest.fixture
def vm(vms: Iterator[Vm]) -> Vm:
    return next(vms)


def vectors_of(vm: Vm, name: str, index: str) -> list[int]:
    (irq,) = [irq for irq in vm.client.query_irqs(device=name) if irq.name == index]
    return [vector.vector for vector in irq.vectors]


def take(vm: Vm, stack: ExitStack, leave: int = 0) -> dict[int, int]:
    """Have the disk use vectors until the host has ``leave`` left (or few more); its eventfds."""
    eventfds: dict[int, int] = {}
    step = STEP
    while step:
        wanted = list(range(len(eventfds), len(eventfds) + step))
        before = vectors_of(vm, "disk", "msix")
        try:
            started = vm.client.irq_start(device="disk", index="msix", vectors=wanted)
        except RemoteError as error:
            assert error.errno == "ENOSPC", error
            says = "the host has fewer and does not say how many" if step > 1 else "no interrupt vectors left"
            assert says in str(error)
            assert vectors_of(vm, "disk", "msix") == before, "refused: those there were run on"
            step //= 2
            continue
        eventfds.update(triggers(stack.enter_context(started)))
    print(f"the host has {len(eventfds)} vectors")
    if leave:
        vm.client.irq_stop(device="disk", index="msix", vectors=list(range(len(eventfds) - leave, len(eventfds))))
    return eventfds


def test_a_host_without_vectors_refuses_and_what_runs_runs_on(vm: Vm) -> None:
    """MSI-X is not rounded to powers of two; a growth that fails comes back to what was, interrupts included."""
    with added(vm, SHORT_NVME, "group", "disk"), ExitStack() as stack:
        (irq,) = [irq for irq in vm.client.query_irqs(device="disk") if irq.name == "msix"]
        assert irq.count == SHORT_NVME_VECTORS
        eventfds = take(vm, stack)
        assert STEP < len(eventfds) < 256
        for vector in (0, 1, len(eventfds) - 1):
            fired(eventfds[vector], 0.1)  # a growth signals what it may have lost
            vm.client.irq_trigger(device="disk", index="msix", vector=vector)
            assert fired(eventfds[vector]) == 1
        with pytest.raises(RemoteError, match="expects a value from 0 to 2047"):
            vm.client.irq_start(device="disk", index="msix", vectors=[SHORT_NVME_VECTORS])


@pytest.mark.parametrize("way", WAYS)
def test_a_host_that_does_not_say_how_many_is_asked_for_the_next_lower_power(vm: Vm, way: str) -> None:
    """MSI: "(a positive return says how many; ENOSPC does not) ... or with the next lower power of two"."""
    with added(vm, XHCI_PORT, way), added(vm, SHORT_NVME, "group", "disk"), ExitStack() as stack:
        take(vm, stack, leave=6)
        with pytest.raises(RemoteError, match="try 8") as refused:
            vm.client.irq_start(device="dev", index="msi", vectors=list(range(XHCI_VECTORS)))
        assert refused.value.errno == "ENOSPC"
        assert vm.client.query_devices()[0].irq_kind == "none"
        control = nics.find(vm, "dev", nics.MSI_ID) + 2
        set_config(vm, "dev", control, 2, 4 << 4 | 1)
        enabled = config(vm, "dev", control, 2)
        granted = 1 << (enabled >> 4 & 7)
        print(f"of sixteen, {granted} were granted")
        assert enabled & 1
        assert granted in (1, 2, 4), "fewer than the six or so that are left, a power of two"
        assert vectors_of(vm, "dev", "msi") == list(range(granted))
        set_config(vm, "dev", control, 2, 0)
        assert config(vm, "dev", control, 2) & 0x71 == 0
        # When the disk lets go, the guest gets what it asks for.
        vm.client.irq_stop(device="disk")
        set_config(vm, "dev", control, 2, 4 << 4 | 1)
        assert config(vm, "dev", control, 2) & 0x71 == 4 << 4 | 1
        assert len(vectors_of(vm, "dev", "msi")) == XHCI_VECTORS
        set_config(vm, "dev", control, 2, 0)
