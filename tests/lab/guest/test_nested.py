"""A real device, a real hypervisor: vfiod holds ``edu`` through the real vfio-pci, a QEMU in this guest attaches to it.

The second-level Linux in that QEMU drives the device from inside: registers through the mapped BAR, MSI, INTx, and
DMA between the device and memory that the IOMMU lets it reach. Nothing of QEMU knows that vfiod is there.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import pytest
from tests.lab.guest import pci
from tests.lab.guest.machine import UNPRIVILEGED_GID, UNPRIVILEGED_UID
from tests.lab.guest.vm import Vm, running_vm
from tests.lab.small.guest import SEEN, SmallGuest, build_initrd, unavailable_reason, vfio_user
from tests.lab.topologies import EDU_PORT

from vfiod.protocol.catalogue.exports import ExportState

MACHINE = "nested"
TEST_SECONDS = 700

#: Seconds for a Linux in an emulator in an emulator: it takes about a hundred on an idle machine.
NESTED_SECONDS = 500.0
#: The memory of the second-level guest, and room for what QEMU maps besides.
MEMLOCK = 384 << 20


def attached(vm: Vm) -> bool:
    [export] = vm.client.query_device_exports()
    return export.state is not ExportState.LISTENING


def test_a_second_level_guest_drives_a_real_device(tmp_path: Path) -> None:
    reason = unavailable_reason()
    if reason is not None:
        pytest.fail(reason)
    initrd = build_initrd(tmp_path)
    # pytest's own directories are closed to the user that vfiod runs as.
    sockets = Path(tempfile.mkdtemp(dir="/tmp"))
    os.chown(sockets, UNPRIVILEGED_UID, UNPRIVILEGED_GID)
    with running_vm(tmp_path, memlock=MEMLOCK, sockets=sockets) as vm, vm.bound(EDU_PORT):
        vm.add(EDU_PORT, "edu0")
        path = sockets / "edu0"
        vm.client.device_export_add(id="x0", type="vfio-user", device="edu0", path=str(path))
        # An emulator in an emulator: QEMU's own five seconds for an answer are too few.
        with SmallGuest(tmp_path, initrd, [vfio_user(path, **{"x-msg-timeout": 60_000})]) as guest:
            findings = guest.wait_done(seconds=NESTED_SECONDS)
            assert [(one.name, one.detail) for one in findings if not one.ok] == []
            assert [one.name for one in findings] == list(SEEN)
            assert findings[1].detail == f"0x{pci.EDU_IDENTITY:08x}"
        deadline = time.monotonic() + 60
        while attached(vm):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert vm.client.query_dma() == []
        assert vm.remove("edu0")
