"""The dry run: every check reported, in the words of the real errors, and nothing changed.

Rules are those of behaviour.md, section 1.
"""

from __future__ import annotations

import errno
import os

import pytest
from tests.unit.server.backends.conftest import Host

from vfiod.protocol import vfio
from vfiod.protocol.catalogue.devices import Check
from vfiod.protocol.errors import CommandError
from vfiod.protocol.fd import FileDescriptor
from vfiod.server.backends.checks import possible
from vfiod.server.backends.group import ContainerSource, GroupOrigin, KernelGroups

CHANGING = ("SET_CONTAINER", "SET_IOMMU", "GET_DEVICE_FD", "MAP_DMA", "RESET", "SET_IRQS")


def run(host: Host, origin: GroupOrigin) -> dict[str, Check]:
    """Run it; nothing may be changed, and no fd be left open."""
    opened = host.groups.fds()
    log = len(host.kernel.log)
    checks = host.groups.check(origin)
    assert not [name for name in host.kernel.log[log:] if any(word in name for word in CHANGING)]
    assert all(fd.closed for fd in origin.fds())
    assert host.groups.fds() == opened
    named = {check.name: check for check in checks}
    assert len(named) == len(checks)
    assert all(check.detail for check in checks)
    return named


def test_all_is_well(host: Host) -> None:
    checks = run(host, host.origin(group_fd=host.group_fd(7)))
    assert list(checks) == [
        "host-device",
        "open-files",
        "reset",
        "group",
        "viable",
        "container",
        "interrupt-remapping",
        "memory-lock",
    ]
    assert all(check.ok for check in checks.values())
    assert possible(tuple(checks.values()))
    assert checks["reset"].detail == "by flr bus"
    assert "0000:01:00.1 (driver vfio-pci)" in checks["viable"].detail


def test_a_missing_reset_is_no_obstacle(host: Host) -> None:
    host.kernel.device("0000:01:00.0").reset_method = None
    checks = run(host, host.origin(group_fd=host.group_fd(7)))
    assert not checks["reset"].ok
    assert possible(tuple(checks.values()))


def test_what_is_foretold_is_what_happens(host: Host) -> None:
    """Each trouble: the check that names it says the same as the real attempt."""

    def not_viable() -> GroupOrigin:
        host.kernel.devices["0000:01:00.1"].driver = "nvme"
        return host.origin(group_fd=host.group_fd(7))

    def wrong_group() -> GroupOrigin:
        return host.origin(group_fd=host.group_fd(8))

    def no_group() -> GroupOrigin:
        return host.origin()

    def no_device() -> GroupOrigin:
        return host.origin("0000:99:00.0")

    def noiommu() -> GroupOrigin:
        return host.origin("05:00.0", group_fd=FileDescriptor(host.kernel.open("/dev/vfio/noiommu-5")))

    host.kernel.add_device("0000:05:00.0", 5, noiommu=True)
    for trouble, name in (
        (wrong_group, "group"),
        (no_group, "group"),
        (no_device, "host-device"),
        (noiommu, "noiommu"),
        (not_viable, "viable"),
    ):
        checks = run(host, trouble())
        assert not checks[name].ok
        assert not possible(tuple(checks.values()))
        with pytest.raises(CommandError) as caught:
            host.groups.open(trouble())
        assert checks[name].detail == str(caught.value)


def test_a_driver_that_is_not_vfio(host: Host) -> None:
    host.kernel.devices["0000:02:00.0"].driver = None
    checks = run(host, host.origin("02:00.0"))
    assert not checks["host-device"].ok
    assert "bound to no driver: bind it to vfio-pci" in checks["host-device"].detail


def test_the_memory_lock_need_is_counted(host: Host) -> None:
    groups = KernelGroups(host.kernel, host.guest.attach, host.guest.detach, mapped_bytes=lambda: 1 << 30)
    host.groups, host.kernel.memory_lock = groups, 64 << 20
    check = run(host, host.origin(group_fd=host.group_fd(7)))["memory-lock"]
    assert not check.ok
    assert f"RLIMIT_MEMLOCK {64 << 20}; {1 << 30} bytes needed" in check.detail
    assert f"raise it to {1 << 30} or above" in check.detail
    host.kernel.ipc_lock = True
    assert run(host, host.origin(group_fd=host.group_fd(7)))["memory-lock"].ok
    host.kernel.ipc_lock = False
    backend = groups.open(host.origin(group_fd=host.group_fd(7)))
    shared = run(host, host.origin("02:00.0", group_fd=host.group_fd(8)))
    assert shared["memory-lock"].ok, "the container there is has the memory already"
    assert shared["container"].detail.startswith("container:0 is tried first")
    backend.close()


def test_interrupt_remapping_and_open_files(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    host.kernel.interrupt_remapping = False
    host.kernel.file_limit = len(os.listdir("/proc/self/fd"))
    checks = run(host, host.origin(group_fd=host.group_fd(7)))
    assert not checks["interrupt-remapping"].ok
    assert not checks["open-files"].ok
    assert "raise it" in checks["open-files"].detail


def test_groups_held_here(host: Host) -> None:
    backend = host.groups.open(host.origin(group_fd=host.group_fd(7)))
    assert run(host, host.origin("01:00.1"))["group"].detail == "group 7 is held here already"
    attached = run(host, host.origin())
    assert not attached["host-device"].ok
    assert "already attached" in attached["host-device"].detail
    outside = FileDescriptor.duplicate_of(backend.region_fd(vfio.PciRegion.BAR2) or -1)
    backend.give_out()
    backend.close()
    assert "taken up again" in run(host, host.origin())["group"].detail
    outside.close()


def test_containers(host: Host) -> None:
    assert run(host, host.origin(group_fd=host.group_fd(7), container=host.container()))["container"].ok
    host.kernel.modes["/dev/vfio/vfio"] = errno.EACCES
    refused = run(host, host.origin(group_fd=host.group_fd(7)))["container"]
    assert not refused.ok
    assert "pass container-fd" in refused.detail
    host.kernel.modes.clear()
    host.kernel.api_version = 3
    assert "speaks version 3" in run(host, host.origin(group_fd=host.group_fd(7)))["container"].detail
    host.kernel.api_version = 0
    source = host.container()
    again = ContainerSource(source.fd.duplicate(), "again")
    backend = host.groups.open(host.origin(group_fd=host.group_fd(7), container=source))
    found = run(host, host.origin("02:00.0", group_fd=host.group_fd(8), container=again))["container"]
    assert found.ok
    assert found.detail == "'again' is container:0"
    backend.close()


def test_without_sysfs(host: Host) -> None:
    host.kernel.sysfs = False
    checks = run(host, host.origin(group_fd=host.group_fd(7)))
    assert possible(tuple(checks.values()))
    assert "sysfs cannot be read" in checks["host-device"].detail


def test_opened_here(host: Host) -> None:
    host.groups = KernelGroups(host.kernel, host.guest.attach, host.guest.detach, allow_open=True)
    assert run(host, host.origin())["group"].detail == "group 7 can be opened here"
    assert host.kernel.nothing_is_open()
