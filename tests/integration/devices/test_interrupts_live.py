"""A hypervisor's life with the interrupts of one device, through a real server process and real eventfds.

Rules are those of behaviour.md, section 4.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Any

import pytest
from tests.integration.devices.conftest import IRQ_ACK, IRQ_RAISE, PATIENCE

from vfiod.client import RemoteError, VectorFds
from vfiod.client.sync import Client


def test_from_relayed_to_direct_and_back_loses_nothing(device: Any) -> None:
    device.add()
    trigger, resample = device.eventfd(), device.eventfd()
    device.client.irq_start(
        device="dev0", mode="relayed", eventfds=[VectorFds(vector=0, trigger=trigger, resample=resample)]
    )
    device.set(IRQ_RAISE, 1)
    assert os.eventfd_read(trigger.number) == 1
    # Pending while the mode changes: the line is still up, so the consumer hears it again.
    device.client.irq_start(device="dev0", mode="direct").close()
    assert os.eventfd_read(trigger.number) == 1
    assert (device.irq().fired, device.irq().vectors[0].mode) == (None, "direct")
    device.set(IRQ_ACK, 1)
    os.eventfd_write(resample.number, 1)
    device.set(IRQ_RAISE, 2)
    assert os.eventfd_read(trigger.number) == 1
    device.client.irq_start(device="dev0", mode="relayed").close()
    assert os.eventfd_read(trigger.number) == 1
    device.set(IRQ_ACK, 2)
    os.eventfd_write(resample.number, 1)
    device.set(IRQ_RAISE, 4)
    assert os.eventfd_read(trigger.number) == 1


def test_the_first_access_completes_and_the_fast_path_returns(device: Any) -> None:
    device.add(mmap_timeout_ms=1)
    with device.client.irq_start(device="dev0") as started, device.client.events("REGION_MMAP_CHANGED") as events:
        trigger = started.irqs[0].trigger_fd
        os.set_blocking(trigger.number, True)
        # Raising the interrupt is an access as well, but before it fired.
        device.set(IRQ_RAISE, 1)
        assert os.eventfd_read(trigger.number) == 1
        device.set(IRQ_ACK, 1)
        assert device.irq().vectors[0].state == "inactive"
        assert [events.get(timeout=PATIENCE).data.enabled for _ in range(2)] == [False, True]
        assert device.client.query_devices(id="dev0")[0].fast_path


def test_an_irq_event_is_rate_limited_and_the_counts_tell_all(device: Any) -> None:
    device.add()
    with device.client.events("IRQ") as events:
        device.client.irq_start(device="dev0", index="msi", mode="relayed").close()
        for _ in range(50):
            device.client.irq_trigger(device="dev0", index="msi")
        while device.irq("msi").delivered < 50:
            pass
        assert events.get(timeout=PATIENCE).data.fired >= 1
        last = events.get(timeout=PATIENCE).data  # the last of the period, at its end
        assert (last.fired, last.delivered) == (50, 50)


def test_a_hypervisor_that_dies_leaves_a_device_that_can_be_started_again(device: Any) -> None:
    device.add()
    program = (
        "import os, sys\n"
        "from vfiod.client.sync import Client\n"
        "client = Client.connect(sys.argv[1])\n"
        "started = client.irq_start(device='dev0', index='msi', vectors=[0, 1, 2], mode='relayed')\n"
        "mapped = client.region_map(device='dev0', region='bar2')\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(device.server.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        [holder] = device.client.query_devices(id="dev0")[0].held_by
        assert holder.kind == "mapping"
        process.send_signal(signal.SIGKILL)
    while device.client.query_devices(id="dev0")[0].held_by:
        pass  # the session's end reaches the server in its own time
    # Its eventfds have no reader any more: signalling them harms nobody.
    for _ in range(3):
        device.client.irq_trigger(device="dev0", index="msi", vector=2)
    assert device.server_fds() == 2 + 3 * 2
    trigger = device.eventfd()
    device.client.irq_start(device="dev0", eventfds=[VectorFds(vector=0, trigger=trigger)])
    assert device.server_fds() == 2 + 2
    device.set(IRQ_RAISE, 1)
    assert os.eventfd_read(trigger.number) == 1


def test_eventfds_that_are_brought_wrong_change_nothing(device: Any) -> None:
    device.add()
    before = device.server_fds()
    good = device.eventfd()
    with open(os.devnull, "rb") as bad, pytest.raises(RemoteError, match="expected eventfd"):
        pairs = [VectorFds(vector=0, trigger=good), VectorFds(vector=1, trigger=bad)]
        device.client.irq_start(device="dev0", index="msi", eventfds=pairs)
    assert device.server_fds() == before
    assert not any(fd.owner.startswith("session") for fd in device.client.query_fds())
    with pytest.raises(RemoteError, match="name each once"):
        device.client.irq_start(device="dev0", index="msi", vectors=[1, 1])
    assert not device.irq("msi").active


def test_started_and_stopped_a_thousand_times_nothing_is_left(device: Any) -> None:
    device.add()
    connected: Client = device.client
    kinds = ({"index": "intx"}, {"index": "intx", "mode": "direct"}, {"index": "msi", "vectors": [0, 3]})
    before = len(connected.query_fds())
    for turn in range(1000):
        with connected.irq_start(device="dev0", **kinds[turn % 3]):
            pass
        if turn % 7 == 0:
            connected.irq_stop(device="dev0")
    connected.irq_stop(device="dev0")
    assert len(connected.query_fds()) == before
