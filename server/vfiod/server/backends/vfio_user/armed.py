"""Which eventfds a server was given, so that it can be given them again. Numbers only: their owner is the device."""

from __future__ import annotations

from vfiod.protocol import vfio

__all__ = ["Armed"]


class Armed:
    """Eventfds by index, action and interrupt; and what is masked."""

    __slots__ = ("_fds", "_masked")

    def __init__(self) -> None:
        self._fds: dict[tuple[int, vfio.IrqAction], dict[int, int]] = {}
        self._masked: dict[int, set[int]] = {}

    def note(self, request: vfio.SetIrqs) -> None:
        """A server was told this."""
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
