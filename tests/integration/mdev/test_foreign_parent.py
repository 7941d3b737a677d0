"""Parents from another package, through a real server: one that waits, one that hangs, one that raises.

Rules are those of behaviour.md, section 8.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.integration.exports.hypervisor import Hypervisor

from vfiod.client.sync import Client
from vfiod.protocol.catalogue.exports import ExportClient
from vfiod.protocol.errors import RemoteError
from vfiod.protocol.fd import FileDescriptor
from vfiod.protocol.limits import MDEV_CALL_MS

from .conftest import PATIENCE, Manager

if TYPE_CHECKING:
    from vfiod.protocol.catalogue.mediated import MdevTypeInfo

CODE = '''
"""A parent whose devices do as a file says: it is read at every access."""

import os
import pathlib
import time

from vfiod.server.mdev.samples.pci import Primer, PrimerDevice

WHERE = pathlib.Path(os.environ["VFIOD_TEST_DIRECTORY"])


def obey(callback):
    path = WHERE / callback
    if path.exists():
        word = path.read_text()
        if word == "raise":
            raise RuntimeError("as told")
        (WHERE / (callback + ".entered")).touch()
        while path.exists():
            time.sleep(0.01)
        (WHERE / (callback + ".left")).touch()


class Slow(PrimerDevice):
    quick = False

    def read(self, index, offset, length):
        if index == 0:
            obey("read")
        return super().read(index, offset, length)

    def write(self, index, offset, data):
        if index == 0:
            obey("write")
        super().write(index, offset, data)

    def reset(self):
        obey("reset")
        super().reset()

    def open(self):
        obey("open")
        super().open()

    def close(self):
        obey("close")
        super().close()
        (WHERE / "closed").touch()

    def attributes(self):
        return {"mood": "calm"}


class Foreign(Primer):
    name = "foreign"

    def create(self, host, uuid, mdev_type, parameters):
        obey("create")
        return Slow(host, memory=4096, vectors=1, msix=0)

    def attributes(self):
        return {"origin": "elsewhere"}
'''


class Foreign:
    """A server that found the parent, and one device of it beside a quick one."""

    def __init__(self, manager: Manager, directory: Path) -> None:
        self.manager = manager
        self.client = manager.client
        self.directory = directory
        for id, parent in (("slow", "foreign"), ("quick", "primer")):
            uuid = self.client.mdev_create(parent=parent, type="primer-pci").uuid
            self.client.device_add(driver="vfio-pci", id=id, mdev=uuid)

    def tell(self, callback: str, word: str = "hang") -> None:
        (self.directory / callback).write_text(word)

    def let_go(self, callback: str) -> None:
        (self.directory / callback).unlink()

    def until(self, name: str) -> None:
        while not (self.directory / name).exists():
            pass

    def get(self, id: str, client: Client | None = None) -> object:
        return (client or self.client).region_read(device=id, region="bar0", offset=0, size=4).value


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Foreign]:
    made = tmp_path / "foreign-1.0.dist-info"
    made.mkdir()
    (made / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign\nVersion: 1.0\n")
    (made / "entry_points.txt").write_text(
        "[vfiod.mdev_parents]\nforeign = vfiod_test_foreign:Foreign\nbroken = vfiod_test_missing:Parent\n"
    )
    (tmp_path / "vfiod_test_foreign.py").write_text(CODE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("VFIOD_TEST_DIRECTORY", str(tmp_path))
    manager = Manager(tmp_path)
    yield Foreign(manager, tmp_path)
    for callback in ("read", "write", "reset", "open", "close", "create"):
        (tmp_path / callback).unlink(missing_ok=True)
    manager.close()


def test_it_works_like_any_other_and_publishes_its_attributes(foreign: Foreign) -> None:
    client = foreign.client
    told: dict[str, MdevTypeInfo] = {one.parent: one for one in client.query_mdev_types()}
    assert told["foreign"].parent_attributes == {"origin": "elsewhere"}
    assert told["foreign"].devices[0].attributes == {"group": "0", "mood": "calm"}
    assert foreign.get("slow") == foreign.get("quick") == 0xF10D0001
    client.region_write(device="slow", region="bar0", offset=4, size=4, value=0x12345678)
    assert client.region_read(device="slow", region="bar0", offset=4, size=4).value == 0x12345678 ^ 0xFFFFFFFF
    client.region_write(device="slow", region="config", offset=4, size=2, value=6)
    assert client.region_read(device="slow", region="config", offset=4, size=2).value == 6
    with client.irq_start(device="slow", index="intx") as started:
        trigger = started.irqs[0].trigger_fd
        assert isinstance(trigger, FileDescriptor)
        client.region_write(device="slow", region="bar0", offset=0x14, size=4, value=1)
        assert select.select([trigger.number], [], [], PATIENCE)[0]
        # The access that raised it may also count as the one that completes it: a level comes again then.
        assert os.eventfd_read(trigger.number) in (1, 2)
        client.region_write(device="slow", region="bar0", offset=0x18, size=4, value=1)
        client.irq_eoi(device="slow", index="intx")
    client.device_reset(id="slow")
    assert client.region_read(device="slow", region="bar0", offset=4, size=4).value == 0xFFFFFFFF


def test_a_broken_one_is_named(foreign: Foreign) -> None:
    with pytest.raises(RemoteError, match=r"'broken' not found.*entry point 'broken' of foreign.*ModuleNotFoundError"):
        foreign.client.mdev_create(parent="broken", type="x")


@pytest.mark.parametrize("callback", ["read", "reset"])
def test_one_that_hangs_holds_up_nobody_and_works_again(foreign: Foreign, callback: str) -> None:
    """The hanging call itself is answered when its time is over; until then everybody else is served."""
    foreign.tell(callback)
    answer: list[RemoteError] = []

    def ask() -> None:
        with Client.connect(foreign.manager.path, timeout=PATIENCE + MDEV_CALL_MS / 1000) as client:
            try:
                client.device_reset(id="slow") if callback == "reset" else foreign.get("slow", client)
            except RemoteError as error:
                answer.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    foreign.until(f"{callback}.entered")
    assert foreign.get("quick") == 0xF10D0001
    foreign.client.device_reset(id="quick")
    uuid = foreign.client.mdev_create(parent="foreign", type="primer-pci").uuid
    foreign.client.device_add(driver="vfio-pci", id="another", mdev=uuid)
    assert foreign.client.region_read(device="another", region="config", offset=0, size=2).value == 0x1234
    assert {one.id for one in foreign.client.query_devices()} == {"slow", "quick", "another"}
    asking.join()
    assert answer[0].errno == "ETIMEDOUT"
    assert "has not returned after 10 s" in answer[0].desc
    with pytest.raises(RemoteError, match=r"EBUSY.*has not returned for"):
        foreign.get("slow")
    foreign.let_go(callback)
    foreign.until(f"{callback}.left")
    while True:
        try:
            assert foreign.get("slow") == 0xF10D0001
            break
        except RemoteError as error:
            assert error.errno == "EBUSY"


@pytest.mark.parametrize("callback", ["read", "reset", "open", "create"])
def test_one_that_raises_is_named_and_goes_on(foreign: Foreign, callback: str) -> None:
    client = foreign.client
    foreign.tell(callback, "raise")
    with pytest.raises(RemoteError, match=r"foreign.*RuntimeError, which is a defect of the parent"):
        match callback:
            case "read":
                foreign.get("slow")
            case "reset":
                client.device_reset(id="slow")
            case _:
                uuid = client.mdev_create(parent="foreign", type="primer-pci").uuid
                client.device_add(driver="vfio-pci", id="third", mdev=uuid)
    foreign.let_go(callback)
    assert foreign.get("slow") == 0xF10D0001
    client.device_reset(id="slow")


def test_a_read_that_fails_through_an_export_is_all_ones_and_logged_and_counted(foreign: Foreign) -> None:
    """Section 3: what hardware gives when nobody answers; the guest goes on, and so does the device."""
    path = foreign.directory / "slow.sock"
    foreign.client.device_export_add(id="door", type="vfio-user", device="slow", path=str(path))
    with Hypervisor(path) as hypervisor:
        assert hypervisor.read(0, 0) == 0xF10D0001
        foreign.tell("read", "raise")
        assert hypervisor.read(0, 0) == 0xFFFF_FFFF
        assert hypervisor.read(0, 4, 1) == 0xFF
        assert hypervisor.bytes(0, 0, 24) == b"\xff" * 24
        foreign.let_go("read")
        assert hypervisor.read(0, 0) == 0xF10D0001
        [export] = foreign.client.query_device_exports()
        assert isinstance(export.client, ExportClient)
        assert export.client.failed_reads == 3
    log = foreign.manager.log()
    assert log.count("export 'door' reads all ones from bar0 at 0x0: ") == 1, "the first is logged: a guest may poll"
    assert log.count("reads all ones") == 1


def test_removed_while_it_hangs_it_is_closed_when_it_returns(foreign: Foreign) -> None:
    client = foreign.client
    foreign.tell("read")
    timeout = PATIENCE + MDEV_CALL_MS / 1000
    with (
        Client.connect(foreign.manager.path, timeout=timeout) as patient,
        pytest.raises(RemoteError, match="ETIMEDOUT"),
    ):
        foreign.get("slow", patient)
    with client.events("DEVICE_DELETED") as events:
        client.device_del(id="slow", force=True)
        events.get(timeout=PATIENCE)
    assert not (foreign.directory / "closed").exists()
    uuid = next(one for one in client.query_mdev_types() if one.parent == "foreign").devices[0].uuid
    with pytest.raises(RemoteError, match=r"cannot be destroyed: its 'read' has not returned"):
        client.mdev_destroy(uuid=uuid)
    foreign.let_go("read")
    foreign.until("closed")
    while True:
        try:
            client.mdev_destroy(uuid=uuid)
            break
        except RemoteError as error:
            assert "has not returned" in error.desc
