"""Which eventfds a server was given, so that it can be given them again. Numbers only: their owner is the device.

But for those that another process gave it: the device has its own, and which of them is which is not known here. Of
these there are duplicates, each until the server is told something else of its interrupt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vfiod.protocol import vfio
from vfiod.protocol.fd import FileDescriptor, close_all

if TYPE_CHECKING:
    from vfiod.server.state.fds import Given, Taken
    from vfiod.server.state.machine import ArmedState

__all__ = ["Armed"]


class Armed:
    """Eventfds by index, action and interrupt; and what is masked."""

    __slots__ = ("_fds", "_masked", "_owned")

    def __init__(self) -> None:
        self._fds: dict[tuple[int, vfio.IrqAction], dict[int, int]] = {}
        self._masked: dict[int, set[int]] = {}
        self._owned: dict[int, FileDescriptor] = {}  # by number

    def note(self, request: vfio.SetIrqs) -> None:
        """A server was told this."""
        self._note(request)
        if self._owned:
            used = {fd for fds in self._fds.values() for fd in fds.values()}
            for number in self._owned.keys() - used:
                self._owned.pop(number).close()

    def _note(self, request: vfio.SetIrqs) -> None:
        if request.is_disable:
            for key in [key for key in self._fds if key[0] == request.index]:
                del self._fds[key]
            self._masked.pop(request.index, None)
            return
        span = range(request.start, request.start + request.count)
        if request.data is vfio.IrqData.EVENTFD:
            fds = self._fds.setdefault((request.index, request.action), {})
            for vector, fd in zip(span, request.fds, strict=True):
                if fd >= 0:
                    fds[vector] = fd
                else:
                    fds.pop(vector, None)
            return
        meant = request.values or (True,) * request.count
        vectors = {vector for vector, yes in zip(span, meant, strict=True) if yes}
        masked = self._masked.setdefault(request.index, set())
        if request.action is vfio.IrqAction.MASK:
            masked |= vectors
        elif request.action is vfio.IrqAction.UNMASK:
            masked -= vectors

    def requests(self, only: int | None = None) -> list[vfio.SetIrqs]:
        """What to tell a server that knows nothing, of all indexes or one: triggers first, the rest, then masks."""
        out: list[vfio.SetIrqs] = []
        for (index, action), fds in sorted(self._fds.items(), key=lambda item: item[0][1] != vfio.IrqAction.TRIGGER):
            if fds and only in (None, index):
                out.append(vfio.SetIrqs.eventfds(action, index, tuple(fds.get(v, -1) for v in range(max(fds) + 1))))
        for index, masked in self._masked.items():
            if only in (None, index):
                out += [vfio.SetIrqs.now(vfio.IrqAction.MASK, index, vector) for vector in sorted(masked)]
        return out

    # --- over a change of the process ---------------------------------------------------------------------

    def keep(self, owner: str, given: Given) -> list[ArmedState]:
        """Describe the eventfds."""
        from vfiod.server.state.machine import ArmedState

        return [
            ArmedState(
                index=index,
                action=int(action),
                vector=vector,
                fd=given.give(self._owned.get(number, number), f"{owner}/irq{index}.{vector}"),
            )
            for (index, action), fds in self._fds.items()
            for vector, number in fds.items()
        ]

    @property
    def masked(self) -> list[tuple[int, list[int]]]:
        """What is masked, by index."""
        return [(index, sorted(vectors)) for index, vectors in self._masked.items() if vectors]

    def adopt(self, armed: list[ArmedState], masked: list[tuple[int, list[int]]], taken: Taken) -> None:
        """Know what another process has told the server."""
        for one in armed:
            fd = taken.take(one.fd)
            self._owned[fd.number] = fd
            self._fds.setdefault((one.index, vfio.IrqAction(one.action)), {})[one.vector] = fd.number
        self._masked.update({index: set(vectors) for index, vectors in masked})

    def close(self) -> None:
        """Close the duplicates."""
        owned, self._owned = self._owned, {}
        close_all(owned.values())
