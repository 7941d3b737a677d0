"""vfiod is replaced under a running QEMU guest that uses its device: the guest notices nothing.

The guest runs its whole examination of the device (registers, mapped memory, MSI, INTx, DMA) three times, through two
reboots, while one server after another takes over from the one before. QEMU stays attached by the same connection.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.takeover.conftest import House
from tests.interop.test_vfio_user_qemu import REQUIRED, all_well, offer, until
from tests.lab.small.guest import SmallGuest, build_initrd, unavailable_reason, vfio_user

from vfiod.protocol.catalogue.exports import ExportState

pytestmark = pytest.mark.qemu


@pytest.fixture
def house() -> Iterator[House]:
    # Short: a Unix socket's path may have 107 bytes.
    directory = Path(tempfile.mkdtemp(prefix="vfiod-"))
    made = House(directory)
    yield made
    made.close()
    shutil.rmtree(directory)


def replace(house: House) -> None:
    before = house.servers[-1]
    made = house.next()
    assert (before.process.poll(), made.process.poll()) == (0, None), before.log() + made.log()


def test_a_guest_notices_nothing(house: House, tmp_path: Path) -> None:
    reason = unavailable_reason()
    if reason is not None:
        (pytest.fail if REQUIRED else pytest.skip)(f"no guest with vfio-user here: {reason}")
    initrd = build_initrd(tmp_path)
    house.first()
    with house.connect() as client:
        path = offer(client, house.directory)
        with SmallGuest(house.directory, initrd, [vfio_user(path)], then="reboot") as guest:
            until(lambda: client.query_device_exports()[0].state is ExportState.ATTACHED, "attached")
            for done in range(3):
                # In the middle of what the guest does, and again between two examinations.
                replace(house)
                findings = guest.wait_done(done + 1)
                replace(house)
            all_well(findings[: 3 * 7], rounds=3)
            [export] = client.query_device_exports()
            assert (export.attached, export.state) == (1, ExportState.ATTACHED)
            assert [one.process.poll() for one in house.servers] == [0] * 6 + [None]
            with guest.monitor() as monitor:
                monitor.execute("quit")
            guest.wait_ended()
        until(lambda: client.query_device_exports()[0].state is ExportState.LISTENING, "the export is free again")
