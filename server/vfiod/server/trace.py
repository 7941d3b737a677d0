"""Trace points: what a developer wants to see of a running server, each to be switched on by its name.

A trace point is an object of this module. Off, it costs one attribute lookup, as long as its caller asks first::

    if trace.irq_eoi.on:
        trace.irq_eoi(device="nic0", index=0)

On, it writes one line to the log, at level INFO, whatever ``--log-level`` says for the rest::

    vfiod.trace irq_eoi device=nic0 index=0

They are switched by ``trace-event-set-state`` and ``--trace``, with a name or a pattern of ``*`` and ``?``
(QEMU ``qapi/trace.json``). The list follows "Trace points" of the reference on device behaviour.
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Iterator
from typing import Final

__all__ = ["TracePoint", "POINTS", "matching", "switch"]

_log: Final = logging.getLogger("vfiod.trace")
_log.setLevel(logging.INFO)

POINTS: Final[dict[str, TracePoint]] = {}
"""Every trace point by name, in the order of declaration."""


class TracePoint:
    """One trace point. Declared at the module level, once.

    Args:
        name: on the wire and in the log; the same as the module's attribute.
        meaning: what happened, for a person.

    Attributes:
        on: whether it writes. Callers ask before they gather what to write.

    """

    __slots__ = ("meaning", "name", "on")

    def __init__(self, name: str, meaning: str) -> None:
        if name in POINTS:
            raise ValueError(f"Trace point {name} is declared twice")
        self.name: Final = name
        self.meaning: Final = meaning
        self.on = False
        POINTS[name] = self

    def __call__(self, **fields: object) -> None:
        """Write one line. The fields are ``device``, ``index``, ``fd`` where they apply, and what else helps."""
        if self.on:
            words = "".join(f" {key}={value}" for key, value in fields.items())
            _log.info("%s%s", self.name, words, extra={"about": {"trace": self.name, **fields}})

    def __repr__(self) -> str:
        return f"<TracePoint {self.name} {'on' if self.on else 'off'}>"


def matching(pattern: str) -> Iterator[TracePoint]:
    """The trace points whose name matches a name or a pattern of ``*`` and ``?``; maybe none."""
    if "*" not in pattern and "?" not in pattern:
        point = POINTS.get(pattern)
        return iter(() if point is None else (point,))
    # "[" is an ordinary character in QEMU's patterns (g_pattern_match), so it must not begin a set here.
    escaped = pattern.replace("[", "[[]")
    return (point for point in POINTS.values() if fnmatch.fnmatchcase(point.name, escaped))


def switch(pattern: str, on: bool) -> int:
    """Switch every matching trace point; returns how many matched."""
    count = 0
    for point in matching(pattern):
        point.on = on
        count += 1
    return count


# --- groups, containers, devices -----------------------------------------------------------------
group_found = TracePoint("group_found", "a VFIO group was recognised")
container_made = TracePoint("container_made", "an IOMMU container was set up")
container_closed = TracePoint("container_closed", "an IOMMU container was closed")
device_populated_region = TracePoint("device_populated_region", "a region was read from the device")
device_populated_irq = TracePoint("device_populated_irq", "an interrupt index was read from the device")
device_realized = TracePoint("device_realized", "a device was added and works")
device_removed = TracePoint("device_removed", "a device is gone")

# --- memory --------------------------------------------------------------------------------------
mapping_made = TracePoint("mapping_made", "a piece of guest memory was mapped into an address space")
mapping_removed = TracePoint("mapping_removed", "a piece of guest memory was unmapped from an address space")

# --- interrupts ----------------------------------------------------------------------------------
irq_fired = TracePoint("irq_fired", "an interrupt arrived from the device")
irq_pending = TracePoint("irq_pending", "an interrupt was set pending behind an active one")
irq_pending_injected = TracePoint("irq_pending_injected", "a pending interrupt became active")
irq_eoi = TracePoint("irq_eoi", "an interrupt was completed")
irq_mask = TracePoint("irq_mask", "an interrupt was masked")
irq_unmask = TracePoint("irq_unmask", "an interrupt was unmasked")
irq_spurious = TracePoint("irq_spurious", "an interrupt came for an index that is not enabled, and was dropped")
fast_path_on = TracePoint("fast_path_on", "mapped access to regions came back")
fast_path_off = TracePoint("fast_path_off", "mapped access to regions went off, to see the completing access")
timer_still_active = TracePoint("timer_still_active", "the fast path's timer found an interrupt still active")
direct_started_level = TracePoint("direct_started_level", "the direct mode of a level interrupt began")
direct_started_edge = TracePoint("direct_started_edge", "the direct mode of an edge interrupt began")
direct_ended = TracePoint("direct_ended", "the direct mode of an interrupt ended")
vector_used = TracePoint("vector_used", "an MSI vector was taken into use")
vector_released = TracePoint("vector_released", "an MSI vector was released")
route_moved = TracePoint("route_moved", "an interrupt's number in the machine changed")

# --- regions, reset ------------------------------------------------------------------------------
config_read = TracePoint("config_read", "config space was read")
config_write = TracePoint("config_write", "config space was written")
region_read = TracePoint("region_read", "a region was read")
region_write = TracePoint("region_write", "a region was written")
reset_begin = TracePoint("reset_begin", "a reset begins")
reset_end = TracePoint("reset_end", "a reset ended, well or not")

# --- channel I/O, mediated devices, exports --------------------------------------------------------
ccw_request = TracePoint("ccw_request", "a channel program was handed to the kernel")
ccw_result = TracePoint("ccw_result", "a channel program ended")
mdev_created = TracePoint("mdev_created", "a mediated device was made")
mdev_started = TracePoint("mdev_started", "a mediated device was told that its VM runs")
mdev_shut_down = TracePoint("mdev_shut_down", "a mediated device was told that its VM stopped")
mdev_destroyed = TracePoint("mdev_destroyed", "a mediated device was destroyed")
export_attached = TracePoint("export_attached", "a hypervisor attached to an exported device")
export_detached = TracePoint("export_detached", "a hypervisor left an exported device")
export_request = TracePoint("export_request", "a hypervisor asked something of an exported device")

# --- the monitor ---------------------------------------------------------------------------------
session_opened = TracePoint("session_opened", "a monitor session began")
session_closed = TracePoint("session_closed", "a monitor session ended")
session_fds = TracePoint("session_fds", "file descriptors arrived at a monitor session")
command_begin = TracePoint("command_begin", "a command begins")
command_end = TracePoint("command_end", "a command ended")
