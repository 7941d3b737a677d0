"""Family "devices": ``device_add``, ``device_del``, and looking; and ``query-machine``."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, Final

import msgspec

from vfiod.protocol.catalogue.declare import Arguments, Empty, command_of
from vfiod.protocol.catalogue.devices import (
    DeviceAdd,
    DeviceAddResult,
    DeviceDel,
    DeviceInfo,
    DeviceListProperties,
    Driver,
    MachineInfo,
    PropertyInfo,
    QueryDevices,
    QueryMachine,
    has_property,
)
from vfiod.protocol.catalogue.words import UNSET
from vfiod.protocol.errors import DeviceNotFound
from vfiod.server.commands.call import Call, Handler

__all__ = ["HANDLERS"]

NOT_PROPERTIES: Final = frozenset({"driver", "id", "x-dry-run"})


# --- adding ---------------------------------------------------------------------------------------


def device_add(call: Call, arguments: DeviceAdd) -> Awaitable[DeviceAddResult]:
    """Add a device, or say whether it could be added."""
    from vfiod.server.commands.adding import add

    return add(call, arguments)


# --- removing -------------------------------------------------------------------------------------


def device_del(call: Call, arguments: DeviceDel) -> Empty:
    """Begin to remove a device."""
    call.machine.remove_device(arguments.id, force=arguments.force, timeout_ms=arguments.timeout_ms)
    return Empty()


# --- looking --------------------------------------------------------------------------------------


def query_devices(call: Call, arguments: QueryDevices) -> list[DeviceInfo]:
    """List devices, or show one."""
    if arguments.id is not UNSET:
        return [call.machine.device_info(call.machine.device(arguments.id))]
    return [call.machine.device_info(device) for device in call.machine.devices.all()]


def device_list_properties(call: Call, arguments: DeviceListProperties) -> list[PropertyInfo]:
    """List what ``device_add`` takes for a driver."""
    from vfiod.protocol.introspection import argument_properties

    if arguments.typename not in set(Driver):
        raise DeviceNotFound.named(arguments.typename)
    properties = msgspec.convert(argument_properties(command_of(DeviceAdd)), list[PropertyInfo])
    driver = Driver(arguments.typename)
    return [one for one in properties if one.name not in NOT_PROPERTIES and has_property(driver, one.name)]


def query_machine(call: Call, arguments: QueryMachine) -> MachineInfo:
    """Show everything at one moment."""
    return call.machine.snapshot(call.server.status, call.server.session_infos())


HANDLERS: Final[dict[type[Arguments[Any]], Handler]] = {
    DeviceAdd: device_add,
    DeviceDel: device_del,
    QueryDevices: query_devices,
    DeviceListProperties: device_list_properties,
    QueryMachine: query_machine,
}
