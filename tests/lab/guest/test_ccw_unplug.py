"""Subchannels that go while they are in use, on a machine of their own: with plain system calls, and through vfiod.

Rules are those of behaviour.md, section 9.
"""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest
from tests.lab.guest import ccw
from tests.lab.guest.machine import qemu
from tests.lab.guest.pci import wait_until
from tests.lab.guest.subchannel import SCHIB, Way, opened
from tests.lab.guest.test_ccw import Machine, machine  # noqa: F401  the fixture
from tests.lab.guest.vm import told
from tests.lab.topologies import CCW_IDS, CCW_SPARE

from vfiod.protocol.catalogue.devices import DeviceRequested
from vfiod.protocol.channel import Orb
from vfiod.protocol.errors import RemoteError
from vfiod.protocol.vfio.ccw import CcwIrq

MACHINE = "ccw-unplug"

WAYS: list[Way] = ["group", "cdev"]


@pytest.mark.parametrize("way", WAYS)
def test_by_plain_system_calls(way: Way) -> None:
    spare = CCW_SPARE[WAYS.index(way)]
    with opened(spare, way) as subchannel:
        qemu().execute("device_del", id=CCW_IDS[spare])
        subchannel.wait(CcwIrq.REQ)
        assert subchannel.start(Orb(0x10_0000)) == errno.EIO
        assert subchannel.reset() == errno.EINVAL
        with pytest.raises(OSError) as caught:
            subchannel.look(SCHIB)
        assert caught.value.errno == errno.ENODEV


@pytest.mark.parametrize("way", WAYS)
def test_the_host_removes_the_mediated_device(machine: Machine, way: Way) -> None:  # noqa: F811
    spare = CCW_SPARE[2]
    name = ccw.mediated(spare)
    with machine.client.events("DEVICE_REQUESTED") as events:
        machine.add(spare, way)
        assert machine.identity().cu_type == 0x3832
        # The kernel waits in this write until the device is let go.
        remover = threading.Thread(target=ccw.remove_mdev, args=(name,))
        remover.start()
        assert told(events.get(timeout=60), DeviceRequested).device == "d"
        assert machine.vm.remove("d")
        remover.join(60)
    assert not remover.is_alive()
    assert not (ccw.MDEV / name).exists()


@pytest.mark.parametrize("way", WAYS)
def test_the_device_is_pulled_out(machine: Machine, way: Way) -> None:  # noqa: F811
    spare = CCW_SPARE[3 + WAYS.index(way)]
    with machine.client.events("DEVICE_REQUESTED") as events:
        machine.add(spare, way)
        subchannel = Path(ccw.CSS / "devices" / ccw.subchannel_of(spare))
        qemu().execute("device_del", id=CCW_IDS[spare])
        assert told(events.get(timeout=60), DeviceRequested).device == "d"
        # It is gone, and says so; the server lives.
        with pytest.raises(RemoteError):
            machine.client.query_subchannel(device="d")
        result = machine.client.ccw_request(device="d", orb=Orb(0x10_0000).pack(), timeout_ms=60_000)
        assert result.condition_code == 3 or result.return_code == "EIO", result
        assert machine.vm.remove("d")
    wait_until(lambda: not subchannel.exists(), "the subchannel to go")
    assert machine.client.query_devices() == []
