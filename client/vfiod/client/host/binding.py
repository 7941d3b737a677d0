"""Giving a PCI device to a driver and taking it back, by ``driver_override``; every step is undone when one fails.

``driver_override`` names the one driver that may bind a device (Documentation/ABI/testing/sysfs-bus-pci). Unlike
``new_id`` it touches no other device with the same ids.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vfiod.client.host.sysfs import HostDevice, HostError, Sysfs
from vfiod.protocol.errors import errno_name

__all__ = ["Bound", "bind", "unbind"]

ADVICE: Final = {
    "EACCES": "this needs root",
    "EPERM": "this needs root, and a kernel that is not locked down",
    "EROFS": "sysfs is mounted read-only here: run it on the host, not in a container",
    "ENODEV": "the driver refuses the device",
    "EBUSY": "the device is in use",
}


@dataclass(frozen=True, slots=True)
class Bound:
    """What was done: the device, the driver it had, the driver it has. The same two: nothing had to be done."""

    address: str
    before: str | None
    after: str | None


def bind(sysfs: Sysfs, address: str, driver: str = "vfio-pci", *, force: bool = False) -> Bound:
    """Bind a device to a driver, whatever it was bound to.

    Args:
        sysfs: the tree.
        address: ``[[DDDD:]BB:]DD.F``.
        driver: a PCI driver the kernel has loaded.
        force: even when a network interface that is up, or a mounted file system, is on it.

    Raises:
        HostError: refused, or the kernel did not do it. The device has its former driver and override again; where
            even that failed, the text says so.

    """
    device = sysfs.device(address)
    if device.driver == driver:
        return Bound(device.address, driver, driver)
    if device.bridge:
        raise HostError(f"{device.address} is a bridge ({device.kind}): VFIO takes the devices behind it, never itself")
    if not (sysfs.bus / "drivers" / driver).exists():
        raise HostError(f"The kernel has no PCI driver '{driver}' loaded: try 'modprobe {driver}'")
    if device.used_by and not force:
        raise HostError(f"{device.address} is in use: {'; '.join(device.used_by)}. --force takes it away all the same")
    return _change(sysfs, device, driver, lambda now: now == driver, f"'{driver}' did not take {device.address}")


def unbind(sysfs: Sysfs, address: str) -> Bound:
    """Take a device from VFIO and let the kernel find its driver. Same promises as :func:`bind`.

    A device that no driver wants ends without one, and that is success.
    """
    device = sysfs.device(address)
    override = device.override
    return _change(
        sysfs,
        device,
        None,
        lambda now: now is None or now not in (override, device.driver),
        f"{device.address} stays with '{device.driver}'",
    )


def _change(
    sysfs: Sysfs, device: HostDevice, override: str | None, right: Callable[[str | None], bool], problem: str
) -> Bound:
    try:
        _apply(sysfs, device.address, override)
        now = sysfs.device(device.address).driver
    except HostError as error:
        raise HostError(f"{error}. {_undo(sysfs, device)}") from error
    if not right(now):
        raise HostError(f"{problem}: it is bound to {now or 'nothing'} now. {_undo(sysfs, device)}")
    return Bound(device.address, device.driver, now)


def _undo(sysfs: Sysfs, device: HostDevice) -> str:
    """Put override and driver back. What came of it, as a sentence."""
    former = device.driver or "no driver"
    try:
        if sysfs.device(device.address).driver == device.driver:
            _write(sysfs.path(device.address) / "driver_override", device.override or "\n")
            return f"It has {former}, as before"
        _apply(sysfs, device.address, device.driver)
        _write(sysfs.path(device.address) / "driver_override", device.override or "\n")
        now = sysfs.device(device.address).driver
    except HostError as error:
        return f"Putting it back failed too: {error}"
    return f"It has {former} again" if now == device.driver else f"It had {former}, and has {now or 'no driver'} now"


def _apply(sysfs: Sysfs, address: str, override: str | None) -> None:
    """Set the override, take the device from its driver, let the kernel probe again."""
    path = sysfs.path(address)
    _write(path / "driver_override", override or "\n")  # a newline clears it
    if sysfs.device(address).driver is not None:
        _write(path / "driver/unbind", address)
    _write(sysfs.bus / "drivers_probe", address)


def _write(path: Path, text: str) -> None:
    """One write to an attribute that exists. Raises HostError with the errno's name and what to do."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)  # never creates: a typo must not become a file
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)
    except OSError as error:
        name = errno_name(error.errno or 0)
        advice = f": {ADVICE[name]}" if name in ADVICE else ""
        raise HostError(f"Writing '{text.strip()}' to {path} failed with {name}{advice}") from error
