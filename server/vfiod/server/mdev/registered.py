"""One parent on the bus: its checks, its lane, and every call into it.

The functions here that call the parent run in a worker's thread, in the parent's own lane.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import TYPE_CHECKING, Any

from vfiod.protocol.catalogue.mediated import DeviceApi, MdevInfo, MdevTypeInfo
from vfiod.protocol.catalogue.words import ID_PATTERN, UNSET
from vfiod.protocol.errors import Busy, CommandError, InvalidArgument, OperationFailed
from vfiod.protocol.limits import MAX_ID, MAX_MDEVS, MDEV_LOOK_MS
from vfiod.server.lanes import Lane
from vfiod.server.mdev.calls import Calls, CallThreads, guarded, published, quietly
from vfiod.server.mdev.instance import Instance, MdevDriver, MdevHost
from vfiod.server.mdev.parent import MdevType, MediatedDevice, Parent, Saved

if TYPE_CHECKING:
    from vfiod.server.state.machine import MdevState

__all__ = ["CallLimits", "Registered", "info_of"]

LOOK_S = MDEV_LOOK_MS / 1000


class CallLimits:
    """How everything of one bus is called.

    Args:
        loop_thread: the loop's thread.
        limit_s: seconds for one call.

    """

    def __init__(self, loop_thread: int, limit_s: float) -> None:
        self._loop_thread = loop_thread
        self._limit = limit_s
        self.threads = CallThreads()

    def of(self, what: str, *, quick: bool = False) -> Calls:
        """For one parent or device."""
        return Calls(what, None if quick else self.threads, self._loop_thread, limit_s=self._limit)


class Registered:
    """A parent on the bus. Made in any thread.

    Args:
        parent: what was offered.
        executor: the machine's pool of threads.
        limits: how it is called.

    Attributes:
        devices: its devices, by UUID.
        making: how many of each type are being made.
        hidden: it is leaving: nothing more is made.
        told: what it published when it was last asked.
        room: how many more of a type it said could be made, when it was last asked.

    Raises InvalidArgument when its name or types cannot be.

    """

    __slots__ = ("calls", "devices", "hidden", "lane", "limits", "making", "name", "parent", "room", "told", "types",
                 "what")  # fmt: skip

    def __init__(self, parent: Parent, executor: Executor, limits: CallLimits) -> None:
        if not isinstance(parent, Parent):
            raise InvalidArgument(f"A parent derives from vfiod.server.mdev.parent.Parent, got {type(parent).__name__}")
        self.parent = parent
        self.name = parent.name
        self.what = f"mdev parent '{self.name}'"
        types = tuple(parent.types)
        self.types: Mapping[str, MdevType] = {one.id: one for one in types}
        self._check_types(types)
        self.lane = Lane(self.what, executor)
        self.limits = limits
        self.calls = limits.of(self.what)
        self.devices: dict[str, Instance] = {}
        self.making: Counter[str] = Counter()
        self.hidden = False
        self.told: dict[str, str] = {}
        self.room: dict[str, int | None] = {}

    def _check_types(self, types: Sequence[MdevType]) -> None:
        if not self.types or len(self.types) != len(types):
            raise InvalidArgument(f"{self.what} needs at least one type, and different ids for its types")
        for name in (self.name, *self.types):
            if len(name) > MAX_ID or re.match(ID_PATTERN, name) is None:
                raise InvalidArgument(f"'{name}' of {self.what} cannot be a name: a letter, then letters, digits, -._")
        for one in self.types.values():
            if one.device_api not in set(DeviceApi):
                raise InvalidArgument(
                    f"Type '{one.id}' of {self.what} has the device API {one.device_api!r}, not one of "
                    + ", ".join(DeviceApi)
                )
            if one.max_instances < 1:
                raise InvalidArgument(
                    f"Type '{one.id}' of {self.what} has {one.max_instances} instances, not 1 or more"
                )
            if one.device_api is DeviceApi.VFIO_CCW and one.max_instances != 1:
                raise InvalidArgument(
                    f"Type '{one.id}' of {self.what} is a subchannel: it has one instance, not {one.max_instances}"
                )

    # --- looking ----------------------------------------------------------------------------------------

    def instances(self, mdev_type: MdevType) -> list[Instance]:
        """Its devices of one type."""
        return [one for one in tuple(self.devices.values()) if one.mdev_type is mdev_type]

    def available(self, mdev_type: MdevType) -> int:
        """How many more of a type can be made, as far as is known: by its count, and what the parent last said."""
        making = self.making[mdev_type.id]
        room = min(mdev_type.max_instances, MAX_MDEVS) - len(self.instances(mdev_type)) - making
        told = self.room.get(mdev_type.id)
        # The parent does not know yet of those that wait for their turn.
        return max(0, room if told is None else min(room, told - making))

    def info(self, mdev_type: MdevType, visible: Mapping[str, Instance]) -> MdevTypeInfo:
        """A type with its devices, as ``query-mdev-types`` shows it: what is known, nobody is asked."""
        return MdevTypeInfo(
            parent=self.name,
            type=mdev_type.id,
            name=mdev_type.name,
            description=mdev_type.description,
            device_api=mdev_type.device_api,
            available_instances=self.available(mdev_type),
            parameters=dict(mdev_type.parameters),
            parent_attributes=self.told,
            devices=[info_of(one) for one in self.instances(mdev_type) if one.uuid in visible],
        )

    # --- in a worker's thread -------------------------------------------------------------------------

    def ask(self) -> None:
        """Ask parent and devices what they publish. Blocks for a moment at most; what fails is published instead."""
        attributes = self.parent.attributes
        self.told = published(self.what, lambda: self.calls.run("attributes", self.what, attributes, limit_s=LOOK_S))
        for one in self.types.values():
            try:
                self.room[one.id] = self.ask_room(one, limit_s=LOOK_S)
            except CommandError as error:
                self.room[one.id] = 0
                self.told = {"error": str(error)} | self.told
        for instance in tuple(self.devices.values()):
            if instance.calls.waits:
                instance.attributes()

    def ask_room(self, mdev_type: MdevType, *, limit_s: float | None = None) -> int | None:
        """What the parent says of the room there is for a type."""
        question = partial(self.parent.available_instances, mdev_type)
        told = self.calls.run("available_instances", self.what, question, limit_s=limit_s)
        if told is not None and type(told) is not int:
            raise OperationFailed(
                "available_instances", self.what, errno="EIO", advice=f"it gave {type(told).__name__}, not a number"
            )
        return told

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
        room = self.room[mdev_type.id] = self.ask_room(mdev_type)
        if room is not None and room < 1:
            raise self.full(mdev_type, uuid)
        device = self.calls.run(
            "create",
            self.what,
            lambda: self.parent.create(host, uuid, mdev_type, parameters),
            late=lambda made: self.parent.destroy(uuid, made, forced=True),
        )
        if not isinstance(device, MediatedDevice):
            raise OperationFailed(
                "create", self.what, errno="EIO", advice=f"it gave {type(device).__name__}, not a MediatedDevice"
            )
        calls = self.limits.of(host.what, quick=device.quick)
        instance = Instance(uuid, self.name, mdev_type, parameters, device, host, calls, group)
        try:
            _bind(instance, drivers)
        except CommandError:
            self.unmake(instance)
            raise
        instance.attributes()
        return instance

    def remake(
        self, host: MdevHost, mdev_type: MdevType, state: MdevState, saved: Saved, drivers: Sequence[MdevDriver]
    ) -> Instance:
        """Make a device again that another process saved. CommandError; what was made is dropped, not destroyed."""
        device = self.calls.run(
            "restore", host.what, lambda: self.parent.restore(host, state.uuid, mdev_type, state.parameters, saved)
        )
        if not isinstance(device, MediatedDevice):
            raise OperationFailed(
                "restore", self.what, errno="EIO", advice=f"it gave {type(device).__name__}, not a MediatedDevice"
            )
        calls = self.limits.of(host.what, quick=device.quick)
        instance = Instance(state.uuid, self.name, mdev_type, state.parameters, device, host, calls, state.group)
        _bind(instance, drivers)
        return instance

    def full(self, mdev_type: MdevType, uuid: str) -> OperationFailed:
        """There is no room for another one."""
        has = len(self.instances(mdev_type))
        advice = f"no more of type '{mdev_type.id}' of {self.what} are available, {has} exist; destroy one first"
        return OperationFailed("mdev-create", f"mdev {uuid}", errno="ENOSPC", advice=advice)

    def unmake(self, instance: Instance) -> None:
        """Take a device apart, whatever anybody says; as soon as it and its parent return from where they hang."""
        _unbind(instance)
        if instance.user is not None:
            instance.calls.quietly("close", instance.what, instance.device.close)
        take_apart = partial(
            self.calls.quietly, "destroy", instance.what, partial(self._destroy, instance, forced=True)
        )
        if instance.calls.hangs:
            instance.calls.quietly("destroy", instance.what, take_apart)
        else:
            take_apart()

    def destroy(self, instance: Instance, drivers: Sequence[MdevDriver]) -> None:
        """Take a device apart, unless the parent refuses: then it is as it was."""
        hangs = instance.calls.hangs
        if hangs:
            raise Busy(f"{instance.what} cannot be destroyed: {hangs}; unregistering its parent would force it")
        _unbind(instance)
        try:
            self.calls.run("destroy", instance.what, partial(self._destroy, instance, forced=False))
        except CommandError:
            quietly("probe", instance.what, _bind, instance, drivers)
            raise

    def start(self, vm: str, instances: Sequence[Instance]) -> None:
        """Tell the parent that the VM is about to run."""
        uuids = [one.uuid for one in instances]
        self.calls.run(
            "start",
            f"{self.what} for VM {vm}",
            lambda: self.parent.start(vm, uuids),
            late=lambda _: self.parent.shutdown(vm, uuids),
        )

    def shutdown(self, vm: str, instances: Sequence[Instance]) -> None:
        """Tell the parent that the VM has stopped."""
        uuids = [one.uuid for one in instances]
        self.calls.run("shutdown", f"{self.what} for VM {vm}", lambda: self.parent.shutdown(vm, uuids))

    def _destroy(self, instance: Instance, *, forced: bool) -> None:
        self.parent.destroy(instance.uuid, instance.device, forced=forced)


def info_of(instance: Instance) -> MdevInfo:
    """One device, as queries show it: of a parent that may wait, what it said last."""
    told = instance.told if instance.calls.waits else instance.attributes()
    return MdevInfo(
        uuid=instance.uuid,
        parent=instance.parent,
        type=instance.mdev_type.id,
        started=instance.vm is not None,
        device=instance.user if instance.user is not None else UNSET,
        attributes={"group": str(instance.group)} | told,
    )


def _bind(instance: Instance, drivers: Sequence[MdevDriver]) -> None:
    """Find the driver of a device by its device API. A device without one exists, and cannot be added.

    A driver is vfiod's own: it asks the device by :meth:`Instance.call`, and does not hang itself.
    """
    driver = next((one for one in drivers if one.device_api == instance.mdev_type.device_api), None)
    if driver is not None:
        what = f"{instance.what} by driver '{driver.name}'"
        guarded("probe", what, driver.probe, instance)
        instance.driver = driver


def _unbind(instance: Instance) -> None:
    driver, instance.driver = instance.driver, None
    if driver is not None:
        quietly("remove", f"{instance.what} by driver '{driver.name}'", driver.remove, instance)
