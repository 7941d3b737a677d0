"""Clients come and go; so do devices and servers. What a client had is taken back, and the next may attach.

Rules are those of behaviour.md, section 5.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vfiod.client.methods.values import VectorFds
from vfiod.protocol import vfio, vfio_user
from vfiod.protocol.errors import RemoteError

from .conftest import Server, eventually
from .hypervisor import PATIENCE, Hypervisor, eventfd, memfd, rung, silent


def busy(function: Callable[..., Any], **arguments: Any) -> None:
    with pytest.raises(RemoteError, match="export 'e-dev0'") as caught:
        function(**arguments)
    assert caught.value.errno == "EBUSY"


def test_what_a_dead_client_had_is_taken_back_and_the_next_attaches(server: Server) -> None:
    path = server.primer()
    before = server.open_fds()
    for _ in range(3):
        hypervisor = server.attach(path)
        with memfd(1 << 16) as memory, eventfd() as trigger:
            hypervisor.map(0, 1 << 16, memory.number)
            hypervisor.trigger(1, trigger.number)
            hypervisor.trigger(4, trigger.number)
            hypervisor.master()
            hypervisor.write(0, 4, 0x77)
            hypervisor.close()
            told = server.event("DEVICE_EXPORT_DETACHED")
            assert (told["id"], told["device"]) == ("e-dev0", "dev0")
        assert server.client.query_dma() == []
        assert all(not one.active for one in server.client.query_irqs(device="dev0"))
        eventually(lambda: server.open_fds() == before)
    hypervisor = server.attach(path)
    assert hypervisor.read(7, 4, 2) & 4 == 0, "bus mastering is off"
    assert hypervisor.read(0, 4) == 0xFFFF_FF88, "the device is otherwise as it was"
    assert server.client.query_device_exports()[0].attached == 4


@pytest.mark.parametrize("cut", [1, 15, 16, 17, 40])
def test_a_client_that_dies_in_the_middle_of_a_message(server: Server, cut: int) -> None:
    path = server.primer()
    hypervisor = server.attach(path)
    with memfd(4096) as memory:
        _, out = hypervisor.channel.request(vfio_user.DmaMap(0, 4096), (memory.number,))
        socket.send_fds(hypervisor.socket, [out.data[:cut]], list(out.fds))
    hypervisor.close()
    assert "closed the connection" in server.event("DEVICE_EXPORT_DETACHED")["reason"]
    with server.attach(path) as following:
        assert following.read(0, 0) == 0xF10D_0001
    assert server.client.query_dma() == []


def test_a_client_that_dies_with_requests_under_way(server: Server) -> None:
    path = server.primer()
    hypervisor = server.attach(path)
    with memfd(1 << 20) as memory:
        for number in range(200):
            hypervisor.ask(vfio_user.DmaMap(number * 4096, 4096, number * 4096), (memory.number,))
        hypervisor.ask(vfio_user.Nothing(), command=vfio_user.Command.DEVICE_RESET)
    hypervisor.close()
    server.event("DEVICE_EXPORT_DETACHED")
    assert server.client.query_dma() == []
    with server.attach(path) as following:
        assert following.read(0, 0) == 0xF10D_0001


def test_the_second_waits_until_the_first_is_gone(server: Server) -> None:
    path = server.primer()
    first = server.attach(path)
    second = server.attach(path, greet=False)
    id = second.ask(vfio_user.Version(0, 0, vfio_user.OURS))
    assert first.read(0, 0) == 0xF10D_0001
    assert server.client.query_device_exports()[0].attached == 1
    first.close()
    second.wait(id)
    assert second.read(0, 0) == 0xF10D_0001
    assert server.client.query_device_exports()[0].attached == 2


def test_the_monitor_looks_and_changes_nothing(server: Server) -> None:
    hypervisor = server.attach(server.primer())
    client = server.client
    assert client.region_read(device="dev0", region="bar0", offset=0, size=4).value == 0xF10D_0001
    busy(client.region_write, device="dev0", region="bar0", offset=4, size=4, value=1)
    busy(client.region_map, device="dev0", region="bar2")
    busy(client.irq_start, device="dev0")
    busy(client.irq_stop)
    busy(client.irq_mask, device="dev0", index="intx")
    busy(client.irq_unmask, device="dev0", index="intx")
    busy(client.irq_eoi, device="dev0", index="intx")
    busy(client.irq_trigger, device="dev0", index="intx")
    busy(client.irq_route, device="dev0", index="intx")
    busy(client.device_reset, id="dev0")
    busy(client.hot_reset, id="dev0")
    busy(client.system_reset)
    with memfd(4096) as memory:
        busy(client.dma_map, iova=0, size=4096, fd=memory)
    busy(client.dma_unmap, iova=0, size=4096)
    line = "region-write dev0 bar0 4 size=4 value=3"
    assert "force=true" in client.human_monitor_command(command_line=line)
    assert client.human_monitor_command(command_line=f"{line} force=on") == ""
    assert hypervisor.read(0, 4) == 0xFFFF_FFFC
    client.region_write(device="dev0", region="bar0", offset=4, size=4, value=1, force=True)
    assert hypervisor.read(0, 4) == 0xFFFF_FFFE
    [device] = client.query_devices()
    assert [(one.kind, one.detail) for one in device.held_by] == [("export", f"e-dev0: process {os.getpid()}")]
    with pytest.raises(RemoteError, match="force=true"):
        client.device_export_del(id="e-dev0")
    client.device_export_del(id="e-dev0", force=True)
    assert hypervisor.gone()
    server.event("DEVICE_EXPORT_DELETED")
    client.region_write(device="dev0", region="bar0", offset=4, size=4, value=2)
    assert not server.directory.joinpath("dev0.sock").exists()


def test_other_devices_are_reset_while_one_is_attached(server: Server) -> None:
    """A reset of what is not attached asks nobody; one of the whole machine touches nothing when it is refused."""
    server.primer("free", export=False)
    hypervisor = server.attach(server.primer())
    client = server.client
    client.region_write(device="free", region="bar0", offset=4, size=4, value=7)
    hypervisor.write(0, 4, 7)
    busy(client.system_reset)
    assert client.region_read(device="free", region="bar0", offset=4, size=4).value == 0xFFFF_FFFF ^ 7
    client.device_reset(id="free")
    assert client.region_read(device="free", region="bar0", offset=4, size=4).value == 0xFFFF_FFFF
    assert hypervisor.read(0, 4) == 0xFFFF_FFFF ^ 7
    client.system_reset(force=True)
    assert hypervisor.read(0, 4) == 0xFFFF_FFFF


def test_a_machine_is_not_completed_over_a_client(server: Server) -> None:
    """``irq-start`` without a device: refused for an attached platform device, done when it is not one, or by force."""
    client = server.client
    server.attach(server.primer("pci"))
    assert client.irq_start(mode="direct").irqs == []
    uuid = client.mdev_create(parent="platform", type="primer-platform").uuid
    path = server.directory / "p.sock"
    client.device_add(driver="vfio-platform", id="dev0", mdev=uuid)
    client.device_export_add(id="e-dev0", type="vfio-user", device="dev0", path=str(path))
    hypervisor = server.attach(path)
    with eventfd() as own:
        hypervisor.trigger(0, own.number)
        busy(client.irq_start, mode="direct")
        assert [vector.mode for vector in client.query_irqs(device="dev0")[0].vectors] == ["direct"]
        hypervisor.close()
        server.event("DEVICE_EXPORT_DETACHED")
        with client.irq_start(mode="direct") as started:
            assert started.irqs


def test_what_the_monitor_had_started_ends_when_a_client_attaches(server: Server) -> None:
    path = server.primer()
    with eventfd() as own:
        server.client.irq_start(device="dev0", index="msi", eventfds=[VectorFds(vector=0, trigger=own)])
        hypervisor = server.attach(path)
        hypervisor.master()
        hypervisor.write(0, 0x14, 1)
        assert silent(own)
        assert all(not one.active for one in server.client.query_irqs(device="dev0"))


def test_removing_the_device_asks_the_client_and_waits(server: Server) -> None:
    hypervisor = server.attach(server.primer())
    with eventfd() as request:
        hypervisor.trigger(4, request.number)
        server.client.device_del(id="dev0", timeout_ms=60_000)
        assert rung(request) == 1
        assert server.client.query_devices()[0].state == "unplugging"
        hypervisor.close()
        names = [server.event(name)["device"] for name in ("DEVICE_EXPORT_DETACHED", "DEVICE_EXPORT_DELETED")]
        assert names == ["dev0", "dev0"]
        assert server.event("DEVICE_DELETED")["device"] == "dev0"


def test_a_client_that_does_not_let_go_is_an_unplug_error_or_forced(server: Server) -> None:
    hypervisor = server.attach(server.primer())
    server.client.device_del(id="dev0", timeout_ms=10)
    assert "export" in server.event("DEVICE_UNPLUG_ERROR")["msg"]
    assert hypervisor.read(0, 0) == 0xF10D_0001
    with memfd(4096) as memory:
        hypervisor.map(0, 4096, memory.number)
    server.client.device_del(id="dev0", force=True)
    assert hypervisor.gone()
    # Others are passed over, so that this is their order.
    assert "removed" in server.event("DEVICE_EXPORT_DETACHED")["reason"]
    assert server.event("DEVICE_DELETED")["released"] is True
    eventually(lambda: server.client.query_device_exports() == [])
    assert server.client.query_dma() == []


def test_an_error_of_the_device_reaches_the_client(server: Server) -> None:
    hypervisor = server.attach(server.primer())
    with eventfd() as error:
        hypervisor.trigger(3, error.number)
        hypervisor.write(0, 0x1C, 1)
        assert rung(error) == 1


def test_the_server_ends_with_a_client_attached(server: Server) -> None:
    hypervisor = server.attach(server.primer())
    with memfd(4096) as memory:
        hypervisor.map(0, 4096, memory.number)
    server.client.quit()
    assert hypervisor.gone()
    assert server.event("DEVICE_EXPORT_DETACHED")["device"] == "dev0"
    assert server.event("DEVICE_DELETED")["device"] == "dev0"
    assert server.process.wait(PATIENCE) == 0
    assert not server.directory.joinpath("dev0.sock").exists()


def test_share_fd_off_gives_nothing_to_map(server: Server) -> None:
    hypervisor = server.attach(server.primer(share_fd=False))
    info, fd = hypervisor.region(2)
    assert (info.size, info.mappable, fd) == (1 << 20, False, None)
    hypervisor.write(2, 64, 0x1234)
    assert hypervisor.read(2, 64) == 0x1234


def test_as_a_property_of_device_add(server: Server) -> None:
    path = server.directory / "as-property.sock"
    uuid = server.client.mdev_create(parent="primer", type="primer-pci").uuid
    with pytest.raises(RemoteError, match="socket path"):
        server.client.device_add(driver="vfio-pci", id="d", mdev=uuid, export="/" + "x" * 200)
    with pytest.raises(RemoteError, match="'id' is missing"):
        server.client.device_add(driver="vfio-pci", mdev=uuid, export=str(path))
    server.client.device_add(driver="vfio-pci", id="d", mdev=uuid, export=str(path))
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(RemoteError, match=r"not found|in use"):
        server.client.device_add(driver="vfio-pci", id="other", mdev=uuid, export=str(path) + "2")
    assert not Path(str(path) + "2").exists()
    with server.attach(path) as hypervisor:
        assert hypervisor.read(0, 0) == 0xF10D_0001


def test_sockets_are_made_with_the_mode_asked_for_or_passed(server: Server) -> None:
    server.primer(export=False)
    path = server.directory / "mode.sock"
    add = server.client.device_export_add
    with memfd(4096) as memory, pytest.raises(RemoteError, match="expected socket"):
        add(id="e", type="vfio-user", device="dev0", fd=memory)
    add(id="e", type="vfio-user", device="dev0", path=str(path), socket_mode=0o660, socket_group=str(os.getgid()))
    assert path.stat().st_mode & 0o777 == 0o660
    with pytest.raises(RemoteError, match="exported already"):
        add(id="e2", type="vfio-user", device="dev0", path=str(path) + "2")
    server.client.device_export_del(id="e")
    server.event("DEVICE_EXPORT_DELETED")
    assert not path.exists()
    ours, theirs = socket.socketpair()
    with theirs:
        add(id="e", type="vfio-user", device="dev0", fd=theirs)
    hypervisor = Hypervisor(ours)
    assert hypervisor.read(0, 0) == 0xF10D_0001
    hypervisor.close()
    assert server.event("DEVICE_EXPORT_DELETED")["id"] == "e"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path) + "3")
        listening.listen()
        add(id="e", type="vfio-user", device="dev0", fd=listening)
    with server.attach(Path(str(path) + "3")) as hypervisor:
        assert hypervisor.read(0, 0) == 0xF10D_0001


def test_twenty_exports_in_one_process(server: Server) -> None:
    paths = [server.primer(f"d{number}") for number in range(20)]
    hypervisors = [server.attach(path) for path in paths]
    before = server.open_fds()
    with memfd(1 << 20) as memory:
        for hypervisor in hypervisors:
            hypervisor.map(0, 0x80000, memory.number)
            hypervisor.map(0x80000, 0x80000, memory.number, offset=0x80000)
    assert server.open_fds() == before + 1, "one file, however often it is mapped"
    asked = [hypervisor.ask(vfio_user.RegionRead(0, 0, 4)) for hypervisor in hypervisors]
    for hypervisor, id in zip(hypervisors, asked, strict=True):
        hypervisor.wait(id)
        hypervisor.master()
        assert hypervisor.dma(0x7F000, 0, 0x2000, 1) == 1
    assert len(server.client.query_dma()) == 40
    for hypervisor in hypervisors[:19]:
        hypervisor.close()
    eventually(lambda: len(server.client.query_dma()) == 2)
    assert hypervisors[19].dma(0x7F000, 0, 0x2000, 1) == 1
    assert server.open_fds() > 0


def test_mapped_bars_cost_the_server_nothing(server: Server) -> None:
    from .hypervisor import mapped

    hypervisor = server.attach(server.primer())
    info, fd = hypervisor.region(2)
    assert fd is not None
    before, requests = server.cpu_ticks(), server.client.query_device_exports()[0].client
    with fd, mapped(fd, info, info.areas[0]) as view:
        for number in range(200_000):
            view[number % 4096] = number & 0xFF
    after = server.client.query_device_exports()[0].client
    assert after == requests, "not one message"
    # Two queries took part in it; a message each would have been 200,000.
    assert server.cpu_ticks() - before <= 3


def test_mdev_serve_is_a_vfio_user_program(tmp_path: Path) -> None:
    path = tmp_path / "device.sock"
    command = [sys.executable, "-m", "vfiod.client.program", "mdev", "serve", "--type", "primer-pci"]
    program = subprocess.Popen([*command, "--socket-path", str(path)])
    try:
        deadline = time.monotonic() + PATIENCE
        while not path.exists():
            assert program.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        for _ in range(2):
            with Hypervisor(path) as hypervisor, memfd(4096) as memory:
                assert hypervisor.read(0, 0) == 0xF10D_0001
                hypervisor.map(0, 4096, memory.number)
        program.send_signal(signal.SIGTERM)
        assert program.wait(PATIENCE) == 0
        assert not path.exists()
    finally:
        program.kill()
        program.wait()
    ours, theirs = socket.socketpair()
    with theirs:
        arguments = ["--fd", str(theirs.fileno()), "--parameter", "vectors=8"]
        program = subprocess.Popen([*command, *arguments], pass_fds=[theirs.fileno()])
    with Hypervisor(ours) as hypervisor:
        assert hypervisor.irq(int(vfio.PciIrq.MSI)).count == 8
    assert program.wait(PATIENCE) == 0, "its one client is gone"


def test_mdev_serve_says_what_is_wrong(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vfiod.client.program", "mdev", "serve"]

    def fails(status: int, words: str, *arguments: str) -> None:
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert done.returncode == status
        assert words in done.stderr

    path = str(tmp_path / "s")
    fails(2, "required", "--type", "primer-pci")
    fails(2, "not allowed with", "--type", "primer-pci", "--socket-path", path, "--fd", "3")
    fails(1, "no-such-type", "--type", "no-such-type", "--socket-path", path)
    fails(1, "inherited", "--type", "primer-pci", "--fd", "99")
    assert not Path(path).exists()


def test_coming_and_going_are_traced(server: Server) -> None:
    path = server.primer()
    server.client.trace_event_set_state(name="export_*ached", enable=True)
    server.attach(path).close()
    server.event("DEVICE_EXPORT_DETACHED")
    server.client.trace_event_set_state(name="*", enable=False)
    log = server.log()
    assert 0 < log.find("export_attached") < log.find("export_detached"), log
