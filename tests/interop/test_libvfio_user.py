"""The samples of libvfio-user, the C library most vfio-user programs are made with, as devices of vfiod.

No distribution has the library, so these run where somebody built it, and say so where not::

    git clone https://github.com/nutanix/libvfio-user && cd libvfio-user
    sed -i 's/bar1_size = 0x3000/bar1_size = 0x4000/' samples/server.c  # the library refuses the sample's own size
    meson setup build && ninja -C build
    VFIOD_LIBVFIO_USER=$PWD/build/samples make test

Seen with efd091b (2026).
"""

from __future__ import annotations

import mmap
import os
import select
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vfiod.client.spawn import own_server
from vfiod.client.sync import Client
from vfiod.protocol.fd import FileDescriptor

SAMPLES = os.environ.get("VFIOD_LIBVFIO_USER", "")
PATIENCE = 120.0
PAGE = 4096

pytestmark = pytest.mark.skipif(not SAMPLES, reason="VFIOD_LIBVFIO_USER does not name the samples of libvfio-user")


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    with own_server(tmp_path, ["--allow-connect"], name="vm1") as server, Client.connect(server.path) as client:
        yield client


@pytest.fixture
def sample(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """The socket of the sample that the test names."""
    path = tmp_path / "sample.sock"
    with subprocess.Popen([f"{SAMPLES}/{request.param}", "-v", path], stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + PATIENCE
            while not path.exists():
                assert process.poll() is None and time.monotonic() < deadline, f"{request.param} does not listen"
                time.sleep(0.01)
            yield path
        finally:
            process.kill()


@pytest.mark.parametrize("sample", ["server"], indirect=True)
def test_its_sample_device_does_all_it_can(client: Client, sample: Path) -> None:
    """Its timer raises INTx, writes to and reads from guest memory: one page as mapped, one by messages."""
    client.device_add(driver="vfio-pci", id="dev0", socket=str(sample))
    regions = {one.name: one for one in client.query_regions(device="dev0")}
    assert (regions["bar0"].size, regions["bar0"].mappable) == (8, False)
    assert [(area.offset, area.size) for area in regions["bar1"].areas] == [(0, PAGE), (2 * PAGE, PAGE)]
    assert client.region_read(device="dev0", region="config", offset=0, size=4).value == 0xBEEFDEAD
    with FileDescriptor(os.memfd_create("guest")) as ram:
        os.ftruncate(ram.number, 2 * PAGE)
        for page in range(2):
            client.getfd(fdname="ram", fd=ram.number)
            client.dma_map(iova=page * PAGE, size=PAGE, fd="ram", offset=page * PAGE)
        [started] = client.irq_start(device="dev0", index="intx", mode="direct").irqs
        assert isinstance(started.trigger_fd, FileDescriptor)
        with started.trigger_fd as trigger:
            client.region_write(device="dev0", region="bar0", offset=0, size=8, value=int(time.time()) + 1)
            assert select.select([trigger.number], [], [], PATIENCE)[0], "INTx did not come"
        with mmap.mmap(ram.number, 2 * PAGE) as memory:
            expected = b"".join(bytes([65 + part]) * 1024 for part in range(4))
            deadline = time.monotonic() + PATIENCE
            while memory[:] != 2 * expected:
                assert time.monotonic() < deadline, "its DMA did not come"
                time.sleep(0.01)
    client.device_reset(id="dev0")
    with client.events() as events:
        client.device_del(id="dev0")
        assert events.get(timeout=PATIENCE).name == "DEVICE_DELETED"


@pytest.mark.parametrize("sample", ["gpio-pci-idio-16"], indirect=True)
def test_its_digital_card(client: Client, sample: Path) -> None:
    """Outputs written are read as inputs: a pin is high at every third pulse."""
    client.device_add(driver="vfio-pci", id="gpio", socket=str(sample))
    assert client.query_devices(id="gpio")[0].vendor_id == 0x494F

    def pins() -> int | None:
        value = client.region_read(device="gpio", region="bar2", offset=1, size=1).value
        assert isinstance(value, int)
        return value

    assert pins() == 0xFF
    client.region_write(device="gpio", region="bar2", offset=0, size=1, value=0x0F)
    assert pins() == 0xF0
