"""Giving a PCI device to a driver and taking it back, by ``driver_override``; every step is undone when one fails.

``driver_override`` names the one driver that may bind a device (Documentation/ABI/testing/sysfs-bus-pci). Unlike
``new_id`` it touches no other device with the same ids.

With a :class:`~vfiod.client.host.journal.Journal`, each step is on disk before it is made: after a crash,
:func:`recover` (and the next :func:`bind` or :func:`unbind` of the device) ends what was begun. A bind that had got as
far as its driver is completed, and undone before; an unbind is completed. Both end in a state somebody asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from msgspec.structs import replace

from vfiod.client.host.journal import Entry, Journal
from vfiod.client.host.sysfs import HostDevice, HostError, Sysfs, vfio_driver
from vfiod.client.signals import held

__all__ = ["Bound", "Recovered", "bind", "recover", "unbind"]

Note: TypeAlias = Callable[[str], None]
"""Takes what is about to be written, before it is."""


@dataclass(frozen=True, slots=True)
class Bound:
    """What was done: the device, the driver it had, the driver it has. The same two: nothing had to be done."""

    address: str
    before: str | None
    after: str | None


@dataclass(frozen=True, slots=True)
class Recovered:
    """What became of a change that a crash had cut short. ``problem``: why it could not be ended; it is tried again."""

    address: str
    phase: str
    driver: str | None
    problem: str | None = None


def bind(
    sysfs: Sysfs, address: str, driver: str = "vfio-pci", *, force: bool = False, journal: Journal | None = None
) -> Bound:
    """Bind a device to a driver, whatever it was bound to.

    Args:
        sysfs: the tree.
        address: ``[[DDDD:]BB:]DD.F``.
        driver: a PCI driver the kernel has loaded.
        force: even when the host is using it: a network interface that is up, the only network card, a mounted disk.
        journal: where each step is noted first. None: a crash half way leaves the device as it then is.

    Raises:
        HostError: refused, or the kernel did not do it. The device has its former driver and override again; where
            even that failed, the text says so.

    A Ctrl-C meanwhile is held until the device is bound, or as it was.

    """
    with journal.locked() if journal is not None else contextlib.nullcontext(), held():
        entry = _settled(sysfs, journal, address)
        device = sysfs.device(address)
        if device.driver == driver:
            return Bound(device.address, driver, driver)
        if device.bridge:
            raise HostError(
                f"{device.address} is a bridge ({device.kind}): VFIO takes the devices behind it, never itself"
            )
        if not (sysfs.bus / "drivers" / driver).exists():
            raise HostError(f"The kernel has no PCI driver '{driver}' loaded: try 'modprobe {driver}'")
        if device.used_by and not force:
            raise HostError(
                f"{device.address} is in use: {'; '.join(device.used_by)}. --force takes it away all the same"
            )
        had = entry if entry is not None and entry.driver == device.driver else None
        begun = Entry(
            address=device.address,
            phase="binding",
            driver=driver,
            original=had.original if had else device.driver,
            override=had.override if had else device.override,
            known=had.known if had else True,
        )

        def change(note: Note) -> None:
            _apply(sysfs, device.address, driver, note)

        return _carry_out(
            sysfs, journal, device, entry, begun, change,
            lambda now: now == driver, f"'{driver}' did not take {device.address}",
        )  # fmt: skip


def unbind(sysfs: Sysfs, address: str, *, force: bool = False, journal: Journal | None = None) -> Bound:
    """Take a device from VFIO and give it back. Same promises as :func:`bind`.

    Bound with a journal, it gets the driver and the override it had. Otherwise the kernel finds its driver; a device
    that no driver wants ends without one, and that is success.

    Args:
        sysfs: the tree.
        address: ``[[DDDD:]BB:]DD.F``.
        force: even when a process has the device open: the kernel then waits until it has let go.
        journal: the one it was bound with.

    """
    with journal.locked() if journal is not None else contextlib.nullcontext(), held():
        entry = _settled(sysfs, journal, address)
        device = sysfs.device(address)
        holders = () if force else sysfs.holders(device)
        if holders:
            who = "; ".join(holders)
            raise HostError(
                f"{device.address} is in use: {who}. The kernel would wait until it is closed; --force does"
            )
        given = vfio_driver(device.driver or "") or device.driver in (None, device.override)
        if not given and (entry is None or entry.driver != device.driver):
            raise HostError(
                f"{device.address} has '{device.driver}', nobody gave it to VFIO: there is nothing to give back"
            )
        if entry is None or entry.driver != device.driver:  # an entry that somebody else has overtaken
            begun = Entry(address=device.address, phase="unbinding", driver=device.driver or "", known=False)
        else:
            begun = replace(entry, phase="unbinding")

        def right(now: str | None) -> bool:
            if begun.known:
                return now == _wanted(sysfs, begun)
            return now is None or now not in (device.override, device.driver)

        return _carry_out(
            sysfs, journal, device, entry, begun, lambda note: _give_back(sysfs, begun, note),
            right, f"{device.address} stays with '{device.driver}'",
        )  # fmt: skip


def recover(sysfs: Sysfs, journal: Journal) -> list[Recovered]:
    """End every change that a crash cut short. Those that cannot be ended now are told, and stay in the journal."""
    ended = []
    with journal.locked():
        for entry in list(journal.entries()):
            if entry.phase == "bound":
                continue
            try:
                ended.append(_end(sysfs, journal, entry))
            except HostError as error:
                ended.append(Recovered(entry.address, entry.phase, None, str(error)))
    return ended


def _settled(sysfs: Sysfs, journal: Journal | None, address: str) -> Entry | None:
    """What the journal says of a device, once nothing of it is half done."""
    entry = None if journal is None else journal.entry(address)
    if journal is None or entry is None or entry.phase == "bound":
        return entry
    _end(sysfs, journal, entry)
    return journal.entry(address)


def _end(sysfs: Sysfs, journal: Journal, entry: Entry) -> Recovered:
    """End one change; may itself be cut short, and done again."""
    try:
        device = sysfs.device(entry.address)
    except HostError:
        journal.remove(entry.address)  # unplugged: whatever comes there next is another device
        return Recovered(entry.address, entry.phase, None)
    if entry.phase == "binding" and device.driver == entry.driver:
        journal.put(replace(entry, phase="bound", step=""))
        return Recovered(entry.address, entry.phase, device.driver)
    _give_back(sysfs, entry, _noting(journal, entry))
    now = sysfs.device(entry.address).driver
    if entry.known and now != _wanted(sysfs, entry):
        raise HostError(f"{entry.address} had {entry.original or 'no driver'}, and has {now or 'no driver'} now")
    journal.remove(entry.address)
    return Recovered(entry.address, entry.phase, now)


def _carry_out(
    sysfs: Sysfs,
    journal: Journal | None,
    device: HostDevice,
    entry: Entry | None,
    begun: Entry,
    change: Callable[[Note], None],
    right: Callable[[str | None], bool],
    problem: str,
) -> Bound:
    note = _noting(journal, begun)
    try:
        change(note)
        now = sysfs.device(device.address).driver
        if not right(now):
            raise HostError(f"{problem}: it is bound to {now or 'nothing'} now")  # noqa: TRY301 - undone like any other
    except HostError as error:
        raise HostError(f"{error}. {_undo(sysfs, journal, device, entry, note)}") from error
    except KeyboardInterrupt:
        _undo(sysfs, journal, device, entry, note)
        raise
    if journal is not None:
        if begun.phase == "binding":
            journal.put(replace(begun, phase="bound"))
        else:
            journal.remove(device.address)
    return Bound(device.address, device.driver, now)


def _undo(sysfs: Sysfs, journal: Journal | None, device: HostDevice, entry: Entry | None, note: Note) -> str:
    """Put override and driver back. What came of it, as a sentence. What failed stays in the journal."""
    former = device.driver or "no driver"
    try:
        same = sysfs.device(device.address).driver == device.driver
        _restore(sysfs, device.address, device.driver, device.override, note)
        now = sysfs.device(device.address).driver
        if now == device.driver and journal is not None:
            journal.remove(device.address) if entry is None else journal.put(entry)
    except HostError as error:
        return f"Putting it back failed too: {error}"
    if now != device.driver:
        return f"It had {former}, and has {now or 'no driver'} now"
    return f"It has {former}, as before" if same else f"It has {former} again"


def _noting(journal: Journal | None, entry: Entry) -> Note:
    return lambda step: None if journal is None else journal.put(replace(entry, step=step))


def _wanted(sysfs: Sysfs, entry: Entry) -> str | None:
    """The driver a device is given back to: none when that has been unloaded since."""
    loaded = entry.original is not None and (sysfs.bus / "drivers" / entry.original).exists()
    return entry.original if loaded else None


def _give_back(sysfs: Sysfs, entry: Entry, note: Note) -> None:
    if entry.known:
        _restore(sysfs, entry.address, _wanted(sysfs, entry), entry.override, note)
    else:
        _apply(sysfs, entry.address, None, note)


def _restore(sysfs: Sysfs, address: str, driver: str | None, override: str | None, note: Note) -> None:
    """Have a device as it was: with that driver, or none, and that override. Doing it again does nothing more."""
    if sysfs.device(address).driver != driver:
        _apply(sysfs, address, driver, note, probe=driver is not None)
    if sysfs.device(address).override != override:
        note("driver_override")
        sysfs.write(sysfs.path(address) / "driver_override", override or "\n")


def _apply(sysfs: Sysfs, address: str, override: str | None, note: Note, *, probe: bool = True) -> None:
    """Set the override, take the device from its driver, let the kernel probe again."""
    path = sysfs.path(address)
    note("driver_override")
    sysfs.write(path / "driver_override", override or "\n")  # a newline clears it
    if sysfs.device(address).driver is not None:
        note("unbind")
        sysfs.write(path / "driver/unbind", path.name)
    if probe:
        note("drivers_probe")
        sysfs.write(sysfs.bus / "drivers_probe", path.name)
