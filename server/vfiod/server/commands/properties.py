"""The properties of ``device_add``: which driver has which, and the options of its model that come from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from vfiod.protocol.catalogue.devices import ONLY_OF, DeviceAdd, Driver, has_property
from vfiod.protocol.catalogue.words import UNSET
from vfiod.protocol.errors import InvalidArgument
from vfiod.protocol.limits import DEFAULT_MMAP_TIMEOUT_MS
from vfiod.server.commands.call import Call
from vfiod.server.devices.model import Options

__all__ = ["check_properties", "options"]

# Names made once: an attribute asked for by a new string is looked up anew, and remembered by the interpreter.
_MEMBERS: Final = tuple((name, name.replace("-", "_")) for name in ONLY_OF)


def check_properties(a: DeviceAdd) -> None:
    """Refuse what the driver does not have, in QEMU's words (``qom/object.c``). Raises InvalidArgument."""
    driver = Driver(a.driver)
    for name, member in _MEMBERS:
        if not has_property(driver, name) and getattr(a, member) is not UNSET:
            raise InvalidArgument(f"Property '{driver}.{name}' not found")


def options(call: Call, a: DeviceAdd) -> Options:
    """The options of the driver's model. What they open (:attr:`Options.romfile`) is the caller's to close."""
    return _OPTIONS[Driver(a.driver)](call, a)


def _pci(call: Call, a: DeviceAdd) -> Options:
    # Here, not above: a server without PCI devices does without their model.
    from vfiod.server.commands.romfile import open_romfile
    from vfiod.server.devices.guest_view import Shown
    from vfiod.server.devices.pci import PciOptions

    timeout = a.mmap_timeout_ms
    if timeout is UNSET:
        timeout = a.x_intx_mmap_timeout_ms
    elif a.x_intx_mmap_timeout_ms not in (UNSET, timeout):
        raise InvalidArgument(
            "Parameters 'mmap-timeout-ms' and 'x-intx-mmap-timeout-ms' are two names of one property;"
            f" they differ: {timeout} and {a.x_intx_mmap_timeout_ms}"
        )
    return PciOptions(
        mmap_timeout_ms=DEFAULT_MMAP_TIMEOUT_MS if timeout is UNSET else timeout,
        share_fd=a.share_fd,
        no_mmap=a.x_no_mmap is True,
        on_request=a.on_request,
        shown=Shown(
            multifunction=a.multifunction is True,
            rombar=a.rombar is not False and a.romfile != "",
            romfile=None if not a.romfile else open_romfile(call, a.romfile),
        ),
    )


def _platform(call: Call, a: DeviceAdd) -> Options:
    from vfiod.server.devices.platform import PlatformOptions

    return PlatformOptions(
        mmap_timeout_ms=DEFAULT_MMAP_TIMEOUT_MS if a.mmap_timeout_ms is UNSET else a.mmap_timeout_ms,
        share_fd=a.share_fd,
        no_mmap=a.x_no_mmap is True,
        on_request=a.on_request,
        irqfd=a.x_irqfd is not False,
    )


def _channel(call: Call, a: DeviceAdd) -> Options:
    """Of vfio-ccw and vfio-ap: nothing of theirs is mapped."""
    del call
    return Options(share_fd=a.share_fd, no_mmap=True, on_request=a.on_request)


_OPTIONS: Final[Mapping[Driver, Callable[[Call, DeviceAdd], Options]]] = {
    Driver.VFIO_PCI: _pci,
    Driver.VFIO_PLATFORM: _platform,
    Driver.VFIO_CCW: _channel,
    Driver.VFIO_AP: _channel,
}
