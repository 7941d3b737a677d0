"""``matrix``: a vfio-ap device without hardware: what there is of its interface, to try managers with.

It has no regions. It can be reset; REQ asks for it back; CFG_CHG says that its adapters, domains or control domains
have changed. They do when told so on its control line, with the kernel's names (``/sys/.../assign_adapter``)::

    assign_adapter 0x05
    assign_domain 0x00ab
    unassign_adapter 0x05

Each line has its answer: ``ok``, or ``error`` and why. Source: ``Documentation/arch/s390/vfio-ap.rst``.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Final

from vfiod.protocol.catalogue.mediated import DeviceApi
from vfiod.protocol.vfio import SetIrqs
from vfiod.protocol.vfio.ccw import VFIO_AP_NUM_IRQS, ApIrq
from vfiod.server.mdev.event_irqs import EventIrqs
from vfiod.server.mdev.parent import DeviceInfo, Host, IrqInfo, MdevType, MediatedDevice, Parent, RegionInfo, Saved
from vfiod.server.mdev.samples.kept import joined, part_of
from vfiod.server.mdev.samples.line import Line, open_line, take_line

__all__ = ["Matrix", "MatrixDevice"]

KINDS: Final = ("adapter", "domain", "control_domain")
LIMIT: Final = 256
"""Numbers of each kind: eight bits (AP architecture)."""

MAX_LINE: Final = 128
"""Bytes of a command; what is longer is refused."""


class MatrixDevice(MediatedDevice):
    """One matrix.

    Args:
        host: the world.
        where: where its control line leads (:mod:`~vfiod.server.mdev.samples.line`).
        saved: what another process's matrix was like: this one goes on as it, and opens nothing. Its fds are taken
            over.

    """

    quick = True

    def __init__(self, host: Host, where: object, saved: Saved | None = None) -> None:
        self._irqs = EventIrqs(VFIO_AP_NUM_IRQS)
        self._lock = threading.Lock()
        self._assigned: dict[str, set[int]] = {kind: set() for kind in KINDS}
        self._typed = bytearray()
        self._answers = bytearray()
        self.line: Line
        if saved is None:
            self.line = open_line("control", where, host, self._ready, self._carrier)
        else:
            values = saved.values
            self._assigned = {kind: set(values["assigned"][kind]) for kind in KINDS}
            self._typed, self._answers = bytearray.fromhex(values["typed"]), bytearray.fromhex(values["answers"])
            self._irqs.restore(saved.fds)
            self.line = take_line(part_of(saved, "line"), host, self._ready, self._carrier)
        self._listen()

    # --- its life -------------------------------------------------------------------------------------

    def close(self) -> None:
        """The user is gone; what is assigned stays."""
        self._irqs.close()

    def reset(self) -> None:
        """The queues are zeroized; there are none here. What is assigned stays, as with the kernel's."""

    def request(self, count: int) -> None:
        """Ask the user by the REQ interrupt."""
        self._irqs.signal(ApIrq.REQ)

    def save(self) -> Saved:
        """What is assigned, half a command, answers that wait, interrupts; the line goes along as the files it is."""
        line = joined({"line": self.line.save()})
        with self._lock:
            assigned = {kind: sorted(numbers) for kind, numbers in self._assigned.items()}
        values = {"assigned": assigned, "typed": self._typed.hex(), "answers": self._answers.hex()}
        return Saved({**values, **line.values}, {**line.fds, **self._irqs.save()})

    # --- what it has ------------------------------------------------------------------------------------

    def device_info(self) -> DeviceInfo:
        """As vfio-ap."""
        return DeviceInfo(regions=0, irqs=VFIO_AP_NUM_IRQS, reset=True)

    def region_info(self, index: int) -> RegionInfo:
        """There is none."""
        raise OSError(errno.EINVAL, f"there is no region {index}")

    def irq_info(self, index: int) -> IrqInfo:
        """As vfio-ap."""
        return self._irqs.info(index)

    def set_irqs(self, request: SetIrqs) -> int:
        """As vfio-ap."""
        return self._irqs.set_irqs(request)

    def read(self, index: int, offset: int, length: int) -> bytes:
        """There is no region."""
        raise OSError(errno.EINVAL, f"there is no region {index}")

    def write(self, index: int, offset: int, data: bytes) -> None:
        """There is no region."""
        raise OSError(errno.EINVAL, f"there is no region {index}")

    def attributes(self) -> Mapping[str, str]:
        """As in sysfs: the matrix is every adapter with every domain."""
        with self._lock:
            adapters, domains = sorted(self._assigned["adapter"]), sorted(self._assigned["domain"])
            controls = sorted(self._assigned["control_domain"])
        matrix = [f"{adapter:02x}.{domain:04x}" for adapter in adapters for domain in domains]
        return {
            "matrix": " ".join(matrix),
            "control_domains": " ".join(f"{one:04x}" for one in controls),
            "control": self.line.path,
        }

    def fds(self) -> Mapping[str, int]:
        """The eventfds it was given."""
        return self._irqs.fds()

    def unplug(self) -> None:
        """It is destroyed: the line goes."""
        self.line.close()

    # --- the control line: on the loop ------------------------------------------------------------------

    def _carrier(self, there: bool) -> None:
        self._typed.clear()
        self._answers.clear()
        if there:
            self.line.want(readable=True, writable=False)

    def _ready(self) -> None:
        self._typed += self.line.read(MAX_LINE)
        while b"\n" in self._typed or len(self._typed) > MAX_LINE:
            text, _, rest = bytes(self._typed).partition(b"\n")
            self._typed = bytearray(rest)
            self._answers += f"{self._command(text.decode('ascii', 'replace').split())}\n".encode()
        while self._answers and (taken := self.line.write(bytes(self._answers))):
            del self._answers[:taken]
        self._listen()

    def _listen(self) -> None:
        # What is not answered is not read: whoever floods it waits.
        self.line.want(readable=not self._answers, writable=bool(self._answers))

    def _command(self, words: list[str]) -> str:
        if len(words) != 2:
            return "error: one name and one number, as in: assign_adapter 0x05"
        verb, _, kind = words[0].partition("_")
        if verb not in ("assign", "unassign") or kind not in KINDS:
            return f"error: {words[0]:.40} is none of assign_, unassign_ with {', '.join(KINDS)}"
        try:
            number = int(words[1], 0)
        except ValueError:
            number = -1
        if not 0 <= number < LIMIT:
            return f"error: {words[1]:.40} is no number from 0 to {LIMIT - 1}"
        with self._lock:
            before = len(self._assigned[kind])
            (self._assigned[kind].add if verb == "assign" else self._assigned[kind].discard)(number)
            changed = len(self._assigned[kind]) != before
        if changed:
            self._irqs.signal(ApIrq.CFG_CHG)
        return "ok"


class Matrix(Parent):
    """Makes matrices."""

    TYPE: Final = MdevType(
        id="matrix-ap",
        name="AP matrix",
        description="A vfio-ap device without hardware: reset, REQ, and CFG_CHG when its control line says so",
        device_api=DeviceApi.VFIO_AP,
        max_instances=256,
        parameters={"control": 'where its control line leads: "pty" (the default), "pty:LINK" or "socket:PATH"'},
    )

    name = "matrix"
    types: Sequence[MdevType] = (TYPE,)

    def create(self, host: Host, uuid: str, mdev_type: MdevType, parameters: Mapping[str, Any]) -> MatrixDevice:
        """Make one; its line is there from now on."""
        return MatrixDevice(host, parameters.get("control", "pty"))

    def restore(
        self, host: Host, uuid: str, mdev_type: MdevType, parameters: Mapping[str, Any], saved: Saved
    ) -> MatrixDevice:
        """Make one around the line that is there."""
        return MatrixDevice(host, parameters.get("control", "pty"), saved)

    def destroy(self, uuid: str, device: MediatedDevice, *, forced: bool) -> None:
        """Always agrees."""
        if isinstance(device, MatrixDevice):
            device.unplug()
