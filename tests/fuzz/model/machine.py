"""The simple model: what a machine must be, command by command; and the rules that drive both.

Each rule asks for something that may be right or wrong, knows by the model which it is, and expects exactly that. After
each rule everything there is to see is compared: what queries say, what the kernel has, what each session has heard,
and that every fd is accounted for.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.fuzz.model.wire import Reply, Session, Wire
from tests.integration.exports.hypervisor import Hypervisor

__all__ = ["MachineModel"]

PAGE = 4096
UUIDS = [f"{n}1111111-2222-3333-4444-555555555555" for n in range(2)]
HOSTS = {"0000:01:00.0": 7, "0000:02:00.0": 8}
KINDS = ("memory", "eventfd", "group-7", "group-8", "cdev-0", "cdev-1", "iommufd", "container")
NAMES = ("a", "b")
IDS = ("d0", "d1")
OBJECTS = ("o0", "o1")
EXPORTS = ("e0", "e1")
MEMORY_PAGES = 8

_ABOUT = {
    **dict.fromkeys(("DEVICE_ADDED", "DEVICE_DELETED", "DEVICE_UNPLUG_ERROR", "DEVICE_RESET"), "device"),
    "MDEV_REMOVED": "uuid",
    "DEVICE_EXPORT_DELETED": "id",
}
TOLD = frozenset(_ABOUT)
"""The events that the model foresees, each exactly once and in order, for every session."""

names = st.sampled_from(NAMES)
ids = st.sampled_from(("d0", "d0", *IDS))
objects = st.sampled_from(OBJECTS)
which = st.integers(0, 7)
pages = st.integers(0, 15)
counts = st.integers(1, 6)
ready = st.sampled_from([True, True, True, False])
"""Whether what a command needs is made first: most random commands would only be refused."""
vectors = st.lists(st.integers(0, 3), min_size=1, max_size=3, unique=True)


@dataclass
class ModelDevice:
    """A device.

    Attributes:
        origin: its UUID, host address, or the object it is bound to.
        backend: ``mdev``, ``group``, ``cdev``.
        kind: which interrupts are active.
        vectors: which of them are started.
        held: by session: the regions it mapped.
        memory: what was written to its BAR 2, by offset.

    """

    origin: str
    backend: str
    iommufd: str | None = None
    kind: str = "none"
    vectors: set[int] = field(default_factory=set)
    held: dict[int, set[str]] = field(default_factory=dict)
    memory: dict[int, int] = field(default_factory=dict)


@dataclass
class ModelSession:
    """A session: its fds by name, and the events it must have heard."""

    names: dict[str, str] = field(default_factory=dict)
    events: list[tuple[str, str]] = field(default_factory=list)


class MachineModel(RuleBasedStateMachine):
    """See the module."""

    # --- beginning and end ----------------------------------------------------------------------------

    @initialize()
    def begin(self) -> None:
        self.wire = Wire()
        for host, group in HOSTS.items():
            self.wire.kernel.add_device(host, group, msi_count=4)
        self.sessions: list[tuple[Session, ModelSession]] = []
        self.devices: dict[str, ModelDevice] = {}
        self.objects: dict[str, str] = {}
        self.mappings: dict[int, tuple[int, str | None]] = {}  # page: pages, object
        self.mdevs: set[str] = set()
        self.exports: dict[str, str] = {}
        self.clients: dict[str, Hypervisor] = {}
        self.sets: dict[int, list[str]] = {}
        self.connect("qmp")
        self.connect("jsonrpc")

    def teardown(self) -> None:
        if hasattr(self, "wire"):
            for client in self.clients.values():
                client.close()
            self.wire.end()

    def pick(self, number: int) -> tuple[Session, ModelSession]:
        return self.sessions[number % len(self.sessions)]

    def told(self, name: str, what: str) -> None:
        for _, session in self.sessions:
            session.events.append((name, what))

    def ask(self, number: int, command: str, /, *fds: int, right: bool, **arguments: Any) -> Reply:
        """Ask, and see that it is answered as the model says."""
        session, _ = self.pick(number)
        given = {key.replace("_", "-"): value for key, value in arguments.items()}
        reply = self.wire.ask(session, command, *fds, **given)
        reply.close()
        assert reply.ok is right, f"{command} {given}: {reply}, but the model says {'right' if right else 'wrong'}"
        if not reply.ok:
            assert reply.value, "an error without words"
            assert "defect of vfiod" not in reply.value, reply.value
        return reply

    def claimed(self, id: str) -> bool:
        """Whether a client of an export has the device."""
        return any(self.exports[export] == id for export in self.clients)

    def free(self, id: str, force: bool) -> ModelDevice | None:
        """The device, when a command may change it."""
        return None if self.claimed(id) and not force else self.devices.get(id)

    # --- sessions and fds -------------------------------------------------------------------------------

    @rule(dialect=st.sampled_from(["qmp", "jsonrpc"]))
    def connect(self, dialect: str) -> None:
        if len(self.sessions) < 4:
            self.sessions.append((self.wire.connect(dialect), ModelSession()))

    @precondition(lambda self: len(self.sessions) > 1)
    @rule(number=which)
    def disconnect(self, number: int) -> None:
        session, model = self.pick(number)
        self.compare_events()
        self.wire.disconnect(session)
        self.sessions.remove((session, model))
        for device in self.devices.values():
            device.held.pop(id(model), None)

    def open(self, kind: str) -> int | None:
        """An fd of this kind, as a manager opens it; None when the kernel says no."""
        if kind == "memory":
            number = os.memfd_create("model", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(number, MEMORY_PAGES * PAGE)
            return number
        if kind == "eventfd":
            return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        word, _, digit = kind.partition("-")
        path = {
            "group": f"/dev/vfio/{digit}",
            "cdev": f"/dev/vfio/devices/vfio{digit}",
            "iommufd": "/dev/iommu",
            "container": "/dev/vfio/vfio",
        }[word]
        try:
            return self.wire.kernel.open(path)
        except OSError:
            return None

    def give(self, number: int, name: str, kind: str, ready: bool) -> None:
        """Send what a command will need, under the name that it will use."""
        if ready and self.pick(number)[1].names.get(name) != kind:
            self.getfd(number, name, kind)

    @rule(number=which, name=names, kind=st.sampled_from(KINDS))
    def getfd(self, number: int, name: str, kind: str) -> None:
        fd = self.open(kind)
        if fd is None:
            self.ask(number, "getfd", fdname=name, right=False)  # no fd came with it
            return
        try:
            self.ask(number, "getfd", fd, fdname=name, right=True)
        finally:
            os.close(fd)
        self.pick(number)[1].names[name] = kind

    @rule(number=which, name=names)
    def closefd(self, number: int, name: str) -> None:
        held = self.pick(number)[1].names
        self.ask(number, "closefd", fdname=name, right=name in held)
        held.pop(name, None)

    @rule(number=which, set_id=st.integers(0, 1), add=st.booleans())
    def fd_set(self, number: int, set_id: int, add: bool) -> None:
        if not add:
            self.ask(number, "remove-fd", fdset_id=set_id, right=set_id in self.sets)
            self.sets.pop(set_id, None)
            return
        fd = self.open("memory")
        assert fd is not None
        try:
            self.ask(number, "add-fd", fd, fdset_id=set_id, right=True)
        finally:
            os.close(fd)
        self.sets.setdefault(set_id, []).append("memory")

    # --- objects and memory -----------------------------------------------------------------------------

    @rule(number=which, id=objects, name=names, kind=st.sampled_from(["memory", "iommufd", "container"]), ready=ready)
    def object_add(self, number: int, id: str, name: str, kind: str, ready: bool) -> None:
        self.give(number, name, kind, ready)
        held = self.pick(number)[1].names
        qom_type = {"memory": "memory-backend-fd", "iommufd": "iommufd", "container": "vfio-container"}[kind]
        right = held.get(name) == kind and id not in self.objects
        self.ask(number, "object-add", qom_type=qom_type, id=id, fd=name, right=right)
        if right:
            del held[name]
            self.objects[id] = kind

    def users(self, id: str) -> bool:
        mapped = any(backend == id for _, backend in self.mappings.values())
        return mapped or any(device.iommufd == id for device in self.devices.values())

    @rule(number=which, id=objects)
    def object_del(self, number: int, id: str) -> None:
        right = id in self.objects and not self.users(id)
        self.ask(number, "object-del", id=id, right=right)
        if right:
            del self.objects[id]

    def overlaps(self, first: int, many: int) -> bool:
        return any(at < first + many and first < at + size for at, (size, _) in self.mappings.items())

    @rule(
        number=which, name=names, first=pages, many=counts, offset=st.integers(0, 3), ready=ready, force=st.booleans()
    )
    def map_fd(self, number: int, name: str, first: int, many: int, offset: int, ready: bool, force: bool) -> None:
        self.give(number, name, "memory", ready)
        held = self.pick(number)[1].names
        fits = offset + many <= MEMORY_PAGES
        right = held.get(name) == "memory" and fits and not self.overlaps(first, many) and (force or not self.clients)
        where = {"iova": first * PAGE, "size": many * PAGE, "offset": offset * PAGE}
        self.ask(number, "dma-map", fd=name, force=force, right=right, **where)
        if right:
            del held[name]
            self.mappings[first] = (many, None)

    @rule(number=which, id=objects, first=pages, many=counts, readonly=st.booleans(), ready=ready, force=st.booleans())
    def map_object(self, number: int, id: str, first: int, many: int, readonly: bool, ready: bool, force: bool) -> None:
        if ready and id not in self.objects:
            self.object_add(number, id, "b", "memory", True)
        right = self.objects.get(id) == "memory" and not self.overlaps(first, many) and (force or not self.clients)
        self.ask(
            number,
            "dma-map",
            iova=first * PAGE,
            size=many * PAGE,
            memory_backend=id,
            readonly=readonly,
            force=force,
            right=right,
        )
        if right:
            self.mappings[first] = (many, id)

    @rule(number=which, first=pages, many=st.integers(1, 20), force=st.booleans())
    def unmap(self, number: int, first: int, many: int, force: bool) -> None:
        end = first + many
        hit = {at: size for at, (size, _) in self.mappings.items() if at < end and first < at + size}
        right = all(first <= at and at + size <= end for at, size in hit.items()) and (force or not self.clients)
        reply = self.ask(number, "dma-unmap", iova=first * PAGE, size=many * PAGE, force=force, right=right)
        if right:
            assert reply.value["size"] == sum(hit.values()) * PAGE
            for at in hit:
                del self.mappings[at]

    # --- devices ----------------------------------------------------------------------------------------

    @rule(number=which, uuid=st.sampled_from(UUIDS))
    def mdev_create(self, number: int, uuid: str) -> None:
        right = uuid not in self.mdevs
        self.ask(number, "mdev-create", parent="primer", type="primer-pci", uuid=uuid, right=right)
        self.mdevs.add(uuid)

    @rule(number=which, uuid=st.sampled_from(UUIDS))
    def mdev_destroy(self, number: int, uuid: str) -> None:
        right = uuid in self.mdevs and not any(device.origin == uuid for device in self.devices.values())
        self.ask(number, "mdev-destroy", uuid=uuid, right=right)
        if right:
            self.mdevs.remove(uuid)
            self.told("MDEV_REMOVED", uuid)

    def added(self, id: str, device: ModelDevice) -> None:
        self.devices[id] = device
        self.told("DEVICE_ADDED", id)

    @rule(number=which, id=ids, uuid=st.sampled_from(UUIDS), ready=ready)
    def add_mdev(self, number: int, id: str, uuid: str, ready: bool) -> None:
        if ready and uuid not in self.mdevs:
            self.mdev_create(number, uuid)
        taken = any(device.origin == uuid for device in self.devices.values())
        right = uuid in self.mdevs and not taken and id not in self.devices
        self.ask(number, "device_add", driver="vfio-pci", id=id, mdev=uuid, right=right)
        if right:
            self.added(id, ModelDevice(uuid, "mdev"))

    @rule(number=which, id=ids, name=names, host=st.sampled_from(sorted(HOSTS)), ready=ready)
    def add_group(self, number: int, id: str, name: str, host: str, ready: bool) -> None:
        self.give(number, name, f"group-{HOSTS[host]}", ready)
        held = self.pick(number)[1].names
        taken = any(device.origin == host for device in self.devices.values())
        right = held.get(name) == f"group-{HOSTS[host]}" and not taken and id not in self.devices
        self.ask(number, "device_add", driver="vfio-pci", id=id, host=host, group_fd=name, right=right)
        if right:
            del held[name]
            self.added(id, ModelDevice(host, "group"))

    @rule(number=which, id=ids, name=names, iommufd=objects, cdev=st.integers(0, 1), ready=ready)
    def add_cdev(self, number: int, id: str, name: str, iommufd: str, cdev: int, ready: bool) -> None:
        if ready and iommufd not in self.objects:
            self.object_add(number, iommufd, name, "iommufd", True)
        self.give(number, name, f"cdev-{cdev}", ready)
        held = self.pick(number)[1].names
        kind = held.get(name, "")
        host = sorted(HOSTS)[int(kind[5:])] if kind.startswith("cdev-") else ""
        bindable = bool(host) and self.free_for_cdev(host, number, name)
        right = bindable and self.objects.get(iommufd) == "iommufd" and id not in self.devices
        self.ask(number, "device_add", driver="vfio-pci", id=id, fd=name, iommufd=iommufd, right=right)
        if right:
            del held[name]
            self.added(id, ModelDevice(host, "cdev", iommufd=iommufd))

    def free_for_cdev(self, host: str, number: int, name: str) -> bool:
        """Nobody has the device, and nobody its group (``drivers/vfio/device_cdev.c``)."""
        if any(device.origin == host for device in self.devices.values()):
            return False
        group = f"group-{HOSTS[host]}"
        return not any(group in session.names.values() for _, session in self.sessions)

    @rule(number=which, id=ids, force=st.booleans())
    def device_del(self, number: int, id: str, force: bool) -> None:
        right = id in self.devices
        self.ask(number, "device_del", id=id, force=force, timeout_ms=0, right=right)
        if not right:
            return
        if (any(self.devices[id].held.values()) or self.claimed(id)) and not force:
            self.told("DEVICE_UNPLUG_ERROR", id)
        else:
            del self.devices[id]
            self.told("DEVICE_DELETED", id)
            for export in [export for export, device in self.exports.items() if device == id]:
                self.hang_up(export)
                del self.exports[export]
                self.told("DEVICE_EXPORT_DELETED", export)
        self.wait_for_events()

    @rule(numbers=st.tuples(which, which), id=ids, uuid=st.sampled_from(UUIDS))
    def add_twice_at_once(self, numbers: tuple[int, int], id: str, uuid: str) -> None:
        """Two sessions ask for the same at once: one has it, and the other is refused."""
        self.ask(numbers[0], "mdev-create", parent="primer", type="primer-pci", uuid=uuid, right=uuid not in self.mdevs)
        self.mdevs.add(uuid)
        taken = any(device.origin == uuid for device in self.devices.values())
        right = not taken and id not in self.devices
        first, second = (self.pick(number)[0] for number in numbers)
        arguments = {"driver": "vfio-pci", "id": id, "mdev": uuid}
        asked = [(one, one.send("device_add", arguments)) for one in (first, second)]

        async def both() -> list[Reply]:
            return [await one.reply(number) for one, number in asked]

        replies = self.wire.run(both)
        assert sorted(reply.ok for reply in replies) == [False, right], replies
        if right:
            self.added(id, ModelDevice(uuid, "mdev"))

    def have(self, number: int, id: str, ready: bool) -> None:
        """Most of what can be done needs a device: one is added first, if one can be."""
        if ready and id not in self.devices:
            used = {device.origin for device in self.devices.values()}
            uuid = next((one for one in UUIDS if one not in used), None)
            if uuid is not None:
                self.add_mdev(number, id, uuid, True)

    # --- what one does with a device ----------------------------------------------------------------------

    @rule(number=which, id=ids, force=st.booleans(), ready=ready)
    def region_map(self, number: int, id: str, force: bool, ready: bool) -> None:
        self.have(number, id, ready)
        device = self.free(id, force)
        self.ask(number, "region-map", device=id, region="bar2", force=force, right=device is not None)
        if device is not None:
            device.held.setdefault(id_of(self.pick(number)), set()).add("bar2")

    @rule(number=which, id=ids)
    def region_unmap(self, number: int, id: str) -> None:
        device = self.devices.get(id)
        mine = set() if device is None else device.held.get(id_of(self.pick(number)), set())
        self.ask(number, "region-unmap", device=id, region="bar2", right="bar2" in mine)
        mine.discard("bar2")

    @rule(
        number=which, id=ids, at=st.integers(0, 3), value=st.integers(0, 0xFFFFFFFF), force=st.booleans(), ready=ready
    )
    def write_and_read(self, number: int, id: str, at: int, value: int, force: bool, ready: bool) -> None:
        """Plain memory of the device keeps what it is given; memory decoding has to be on."""
        self.have(number, id, ready)
        device = self.free(id, force)
        self.ask(
            number,
            "region-write",
            device=id,
            region="config",
            offset=4,
            size=2,
            value=6,
            force=force,
            right=device is not None,
        )
        self.ask(
            number, "region-write", device=id, region="bar2", offset=at * 4, size=4, value=value,
            force=force, right=device is not None,
        )  # fmt: skip
        if device is not None:
            device.memory[at] = value
            for offset, expected in device.memory.items():
                reply = self.ask(number, "region-read", device=id, region="bar2", offset=offset * 4, size=4, right=True)
                assert reply.value["value"] == expected

    @rule(
        number=which,
        id=ids,
        index=st.sampled_from(["intx", "msi", "err"]),
        wanted=vectors,
        force=st.booleans(),
        ready=ready,
    )
    def irq_start(self, number: int, id: str, index: str, wanted: list[int], force: bool, ready: bool) -> None:
        self.have(number, id, ready)
        device = self.free(id, force)
        right = device is not None and index != "err" and (index == "msi" or wanted == [0])
        self.ask(number, "irq-start", device=id, index=index, vectors=wanted, force=force, right=right)
        if device is not None and right:
            device.vectors = (device.vectors if device.kind == index else set()) | set(wanted)
            device.kind = index

    @rule(number=which, id=ids, name=names, index=st.sampled_from(["intx", "msi"]), ready=ready, force=st.booleans())
    def irq_start_passed(self, number: int, id: str, name: str, index: str, ready: bool, force: bool) -> None:
        self.have(number, id, ready)
        self.give(number, name, "eventfd", ready)
        device, held = self.free(id, force), self.pick(number)[1].names
        right = device is not None and held.get(name) == "eventfd"
        self.ask(number, "irq-start", device=id, index=index, eventfds=[{"trigger": name}], force=force, right=right)
        if device is not None and right:
            del held[name]
            device.vectors = (device.vectors if device.kind == index else set()) | {0}
            device.kind = index

    @rule(number=which, id=ids, index=st.sampled_from(["intx", "msi", None]), force=st.booleans(), ready=ready)
    def irq_stop(self, number: int, id: str, index: str | None, force: bool, ready: bool) -> None:
        self.have(number, id, ready)
        device = self.free(id, force)
        more = {} if index is None else {"index": index}
        self.ask(number, "irq-stop", device=id, force=force, right=device is not None, **more)
        if device is not None and index in (None, device.kind):
            device.kind, device.vectors = "none", set()

    @rule(number=which, id=ids, gsi=st.one_of(st.none(), st.integers(0, 99)), force=st.booleans(), ready=ready)
    def irq_route(self, number: int, id: str, gsi: int | None, force: bool, ready: bool) -> None:
        self.have(number, id, ready)
        more = {} if gsi is None else {"number": gsi}
        self.ask(
            number, "irq-route", device=id, index="intx", force=force, right=self.free(id, force) is not None, **more
        )

    @rule(number=which, id=ids, force=st.booleans(), ready=ready)
    def device_reset(self, number: int, id: str, force: bool, ready: bool) -> None:
        self.have(number, id, ready)
        device = self.free(id, force)
        self.ask(number, "device-reset", id=id, force=force, right=device is not None)
        if device is not None:
            self.told("DEVICE_RESET", id)
            if device.backend == "mdev":
                device.memory.clear()

    @rule(number=which, export=st.sampled_from(EXPORTS), id=ids, ready=ready)
    def export_add(self, number: int, export: str, id: str, ready: bool) -> None:
        self.have(number, id, ready)
        right = id in self.devices and export not in self.exports and id not in self.exports.values()
        path = f"{self.wire.folder.name}/{export}"
        self.ask(number, "device-export-add", id=export, type="vfio-user", device=id, path=path, right=right)
        if right:
            self.exports[export] = id

    @rule(number=which, export=st.sampled_from(EXPORTS), force=st.booleans())
    def export_del(self, number: int, export: str, force: bool) -> None:
        right = export in self.exports and (force or export not in self.clients)
        self.ask(number, "device-export-del", id=export, force=force, right=right)
        if right:
            self.hang_up(export)
            del self.exports[export]
            self.told("DEVICE_EXPORT_DELETED", export)
            self.wait_for_events()

    # --- hypervisors --------------------------------------------------------------------------------------

    @rule(export=st.sampled_from(EXPORTS), id=ids)
    def attach(self, export: str, id: str) -> None:
        """A hypervisor attaches: what ran of the interrupts is off, and the monitor changes nothing any more."""
        if export not in self.exports:
            self.export_add(0, export, id, True)
        if export not in self.exports or export in self.clients:
            return
        path = Path(self.wire.folder.name) / export
        self.clients[export] = self.wire.run(lambda: asyncio.to_thread(Hypervisor, path))
        self.wire.until(lambda: self.state(export) == "attached")
        self.stopped(self.exports[export])

    @rule(export=st.sampled_from(EXPORTS), id=ids, many=st.integers(1, 4))
    def client_starts_msi(self, export: str, id: str, many: int) -> None:
        self.attach(export, id)
        client = self.clients.get(export)
        if client is None:
            return
        fds = [os.eventfd(0, os.EFD_CLOEXEC) for _ in range(many)]
        try:
            self.wire.run(lambda: asyncio.to_thread(client.trigger, 1, *fds))
        finally:
            for fd in fds:
                os.close(fd)
        device = self.devices[self.exports[export]]
        device.vectors = (device.vectors if device.kind == "msi" else set()) | set(range(many))
        device.kind = "msi"

    @rule(export=st.sampled_from(EXPORTS))
    def detach(self, export: str) -> None:
        """It goes; another may come."""
        if export in self.clients:
            device = self.exports[export]
            self.hang_up(export)
            self.wire.until(lambda: self.state(export) == "listening")
            self.stopped(device)

    def hang_up(self, export: str) -> None:
        client = self.clients.pop(export, None)
        if client is not None:
            client.close()
            self.stopped(self.exports[export])

    def stopped(self, id: str) -> None:
        if id in self.devices:
            self.devices[id].kind, self.devices[id].vectors = "none", set()

    def state(self, export: str) -> str:
        doors = self.wire.machine.doors
        assert doors is not None
        return next(str(one.state) for one in doors.infos() if one.id == export)

    @rule(number=which, what=st.integers(0, 9))
    def nonsense(self, number: int, what: int) -> None:
        """No such command; no such argument; a name that is none, whose fd is closed."""
        if what < 3:
            self.ask(number, ("nope", "device-del", "QUERY-NAME")[what], right=False)
        elif what < 8:
            command = ("device_add", "dma-map", "irq-start", "object-add", "query-name")[what - 3]
            self.ask(number, command, right=False, nonsense=[1, {"a": None}])
        else:
            fd = os.eventfd(0, os.EFD_CLOEXEC)
            try:
                self.ask(number, "getfd", fd, fdname="7", right=False)
            finally:
                os.close(fd)

    # --- the comparison -----------------------------------------------------------------------------------

    def heard(self, session: Session) -> list[tuple[str, str]]:
        return [(name, str(data[_ABOUT[name]])) for name, data in session.events if name in TOLD]

    def wait_for_events(self) -> None:
        most = [(session, len(model.events)) for session, model in self.sessions]
        self.wire.until(lambda: all(len(self.heard(session)) >= many for session, many in most))

    def compare_events(self) -> None:
        self.wait_for_events()
        for session, model in self.sessions:
            assert Counter(self.heard(session)) == Counter(model.events), (self.heard(session), model.events)
            for kind in ("DEVICE_ADDED", "DEVICE_DELETED", "DEVICE_RESET"):
                got, due = ([what for name, what in one if name == kind] for one in (self.heard(session), model.events))
                assert got == due

    def query(self, command: str, **arguments: Any) -> Any:
        return self.ask(0, command, right=True, **arguments).value

    @invariant()
    def all_is_as_the_model_says(self) -> None:
        if not hasattr(self, "wire"):
            return
        self.wire.settle()
        snapshot = self.query("query-machine")
        found = {one["id"]: (one["backend"], one["irq-kind"], bool(one["held-by"])) for one in snapshot["devices"]}
        backends = {"mdev": "mdev", "group": "kernel-group", "cdev": "kernel-cdev"}
        assert found == {
            id: (backends[device.backend], device.kind, any(device.held.values()) or self.claimed(id))
            for id, device in self.devices.items()
        }
        assert {one["id"] for one in snapshot["objects"]} == set(self.objects)
        assert {bool(one["used-by"]) for one in snapshot["objects"]} == {self.users(id) for id in self.objects}
        assert {(one["iova"], one["size"]) for one in snapshot["mappings"]} == {
            (first * PAGE, many * PAGE) for first, (many, _) in self.mappings.items()
        }
        assert set(snapshot["mdevs"]) == self.mdevs
        assert {one["fdset-id"]: len(one["fds"]) for one in snapshot["fdsets"]} == {
            number: len(fds) for number, fds in self.sets.items()
        }
        assert len(snapshot["sessions"]) == len(self.sessions)
        started: dict[str, set[int]] = {id: set() for id in self.devices}
        for irq in snapshot["irqs"]:
            started[irq["device"]] |= {vector["vector"] for vector in irq["vectors"]}
        assert started == {id: device.vectors for id, device in self.devices.items()}
        exports = self.query("query-device-exports")
        assert {one["id"]: one["device"] for one in exports} == self.exports
        self.fds_are_accounted_for()
        self.the_kernel_agrees()
        self.compare_events()

    def fds_are_accounted_for(self) -> None:
        """Each fd has one owner, is open, and is what it is said to be; and each session has what it named."""
        listed = self.query("query-fds")
        numbers = [one["number"] for one in listed]
        assert len(numbers) == len(set(numbers))
        for one in listed:
            assert self.wire.kind(one["number"]) == one["kind"]
        named = Counter(one.get("name") for one in listed if one["owner"].startswith("session:"))
        assert named == Counter(name for _, session in self.sessions for name in session.names)

    def the_kernel_agrees(self) -> None:
        """What the kernel has mapped, opened and armed."""
        due = sorted((first * PAGE, many * PAGE) for first, (many, _) in self.mappings.items())
        kernel = self.wire.kernel
        for container in kernel.containers():
            if container.iommu is not None:
                assert sorted((iova, size) for iova, (size, _, _) in container.mappings.items()) == due
        for ioas in kernel.ioases():
            assert sorted((iova, one.size) for iova, one in ioas.mappings.items()) == due
        by_host = {device.origin: device for device in self.devices.values()}
        for host in HOSTS:
            real = kernel.device(host)
            device = by_host.get(host)
            if device is None:
                assert not real.opened or any(
                    name.startswith("cdev-") for _, session in self.sessions for name in session.names.values()
                )
                continue
            assert real.opened
            armed = {number for number, trigger in enumerate(real.triggers) if trigger is not None}
            assert (armed if real.mode is not None else set()) == device.vectors


def id_of(pair: tuple[Session, ModelSession]) -> int:
    """What a device's holders call a session."""
    return id(pair[1])
