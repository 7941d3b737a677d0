"""One parent on the bus: its checks, its lane, and every call into it.

The functions here that call the parent run in a worker's thread, in the parent's own lane.
"""

from __future__ import annotations

import importlib
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from typing import Any, Final

from vfiod.protocol.catalogue.mediated import DeviceApi
from vfiod.protocol.catalogue.words import ID_PATTERN
from vfiod.protocol.errors import CommandError, InvalidArgument, OperationFailed
from vfiod.protocol.limits import MAX_ID, MAX_MDEVS
from vfiod.server.lanes import Lane
from vfiod.server.mdev.instance import Instance, MdevDriver, MdevHost, guarded, quietly
from vfiod.server.mdev.parent import MdevType, MediatedDevice, Parent

__all__ = ["Registered", "load_parents"]

_log: Final = logging.getLogger(__name__)


class Registered:
    """A parent on the bus.

    Args:
        parent: what was offered.
        executor: the machine's pool of threads.

    Attributes:
        devices: its devices, by UUID.
        making: how many of each type are being made.
        hidden: it is leaving: nothing more is made.

    Raises InvalidArgument when its name or types cannot be.

    """

    __slots__ = ("devices", "hidden", "lane", "making", "name", "parent", "types", "what")

    def __init__(self, parent: Parent, executor: Executor) -> None:
        if not isinstance(parent, Parent):
            raise InvalidArgument(f"A parent derives from vfiod.server.mdev.parent.Parent, got {type(parent).__name__}")
        self.parent = parent
        self.name = parent.name
        self.what = f"mdev parent '{self.name}'"
        self.types: Mapping[str, MdevType] = {one.id: one for one in parent.types}
        self._check_types(parent.types)
        self.lane = Lane(self.what, executor)
        self.devices: dict[str, Instance] = {}
        self.making: Counter[str] = Counter()
        self.hidden = False

    def _check_types(self, types: Sequence[MdevType]) -> None:
        if not self.types or len(self.types) != len(types):
            raise InvalidArgument(f"{self.what} needs at least one type, and different ids for its types")
        for name in (self.name, *self.types):
            if len(name) > MAX_ID or re.match(ID_PATTERN, name) is None:
                raise InvalidArgument(f"'{name}' of {self.what} cannot be a name: a letter, then letters, digits, -._")
        for one in self.types.values():
            if one.max_instances < 1:
                raise InvalidArgument(
                    f"Type '{one.id}' of {self.what} has {one.max_instances} instances, not 1 or more"
                )
            if one.device_api is DeviceApi.VFIO_CCW and one.max_instances != 1:
                raise InvalidArgument(
                    f"Type '{one.id}' of {self.what} is a subchannel: it has one instance, not {one.max_instances}"
                )

    def instances(self, mdev_type: MdevType) -> list[Instance]:
        """Its devices of one type."""
        return [one for one in tuple(self.devices.values()) if one.mdev_type is mdev_type]

    def available(self, mdev_type: MdevType) -> int:
        """How many more of a type can be made now."""
        making = self.making[mdev_type.id]
        room = min(mdev_type.max_instances, MAX_MDEVS) - len(self.instances(mdev_type)) - making
        told = guarded("available_instances", self.what, self.parent.available_instances, mdev_type)
        # The parent does not know yet of those that wait for their turn.
        return max(0, room if told is None else min(room, told - making))

    # --- in a worker's thread -------------------------------------------------------------------------

    def make(
        self,
        host: MdevHost,
        mdev_type: MdevType,
        uuid: str,
        parameters: Mapping[str, Any],
        group: int,
        drivers: Sequence[MdevDriver],
    ) -> Instance:
        """Create a device and let its driver probe it. On failure nothing is left of it."""
        device = guarded("create", self.what, self.parent.create, host, uuid, mdev_type, parameters)
        if not isinstance(device, MediatedDevice):
            raise OperationFailed(
                "create", self.what, errno="EIO", advice=f"it gave {type(device).__name__}, not a MediatedDevice"
            )
        instance = Instance(uuid, self.name, mdev_type, parameters, device, host, group)
        try:
            _bind(instance, drivers)
        except CommandError:
            self.unmake(instance)
            raise
        return instance

    def unmake(self, instance: Instance) -> None:
        """Take a device apart, whatever anybody says."""
        _unbind(instance)
        if instance.user is not None:
            quietly("close", instance.what, instance.device.close)
        quietly("destroy", instance.what, self._destroy, instance, True)

    def destroy(self, instance: Instance, drivers: Sequence[MdevDriver]) -> None:
        """Take a device apart, unless the parent refuses: then it is as it was."""
        _unbind(instance)
        try:
            guarded("destroy", instance.what, self._destroy, instance, False)
        except CommandError:
            quietly("probe", instance.what, _bind, instance, drivers)
            raise

    def start(self, vm: str, instances: Sequence[Instance]) -> None:
        """Tell the parent that the VM is about to run."""
        guarded("start", f"{self.what} for VM {vm}", self.parent.start, vm, [one.uuid for one in instances])

    def shutdown(self, vm: str, instances: Sequence[Instance]) -> None:
        """Tell the parent that the VM has stopped."""
        guarded("shutdown", f"{self.what} for VM {vm}", self.parent.shutdown, vm, [one.uuid for one in instances])

    def _destroy(self, instance: Instance, forced: bool) -> None:
        self.parent.destroy(instance.uuid, instance.device, forced=forced)


def _bind(instance: Instance, drivers: Sequence[MdevDriver]) -> None:
    """Find the driver of a device by its device API. A device without one exists, and cannot be added."""
    driver = next((one for one in drivers if one.device_api == instance.mdev_type.device_api), None)
    if driver is not None:
        guarded("probe", f"{instance.what} by driver '{driver.name}'", driver.probe, instance)
        instance.driver = driver


def _unbind(instance: Instance) -> None:
    driver, instance.driver = instance.driver, None
    if driver is not None:
        quietly("remove", f"{instance.what} by driver '{driver.name}'", driver.remove, instance)


def load_parents(built_in: Mapping[str, str], group: str | None) -> list[Parent]:
    """Load the built-in parents (``name: "module:attribute"``) and those of other packages.

    One that cannot be loaded is logged and left out. Blocks; in a worker's thread.
    """
    found: list[Parent] = []
    for name, where in built_in.items():
        _load(f"built-in '{name}'", where, found)
    if group is not None:
        from importlib.metadata import entry_points  # slow to import, and needed only here

        for point in entry_points(group=group):
            _load(f"entry point '{point.name}'", point.value, found)
    return found


def _load(origin: str, where: str, found: list[Parent]) -> None:
    def load() -> Parent:
        module, _, attribute = where.partition(":")
        factory: Any = importlib.import_module(module)
        for name in attribute.strip().split("."):
            factory = getattr(factory, name)
        parent: Parent = factory()
        return parent

    try:
        found.append(guarded("load", f"mdev parent of {origin} ({where})", load))
    except CommandError as error:
        _log.error("%s", error)
