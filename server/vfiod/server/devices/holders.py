"""Which monitor sessions hold a device, because they were given the fd that maps a region of it."""

from __future__ import annotations

from collections.abc import Iterable

from vfiod.protocol.catalogue.devices import Holder
from vfiod.protocol.errors import InvalidArgument

__all__ = ["RegionHolders"]


class RegionHolders:
    """The sessions that mapped regions of one device. On the loop."""

    def __init__(self) -> None:
        self._names: dict[int, set[str]] = {}  # by session: names of the regions

    def add(self, session: int, region: str) -> None:
        """A session was given the fd of a region."""
        self._names.setdefault(session, set()).add(region)

    def drop(self, session: int | None, region: str, *, device: str) -> None:
        """A session no longer holds a region. InvalidArgument, which names the device, when it holds no such."""
        names = self._names.get(session) if session is not None else None
        if session is None or not names or region not in names:
            held = f"it holds {', '.join(sorted(names))}" if names else "it holds no region of it"
            raise InvalidArgument(
                f"This session does not hold region {region} of device '{device}' by region-map: {held}"
            )
        names.discard(region)
        if not names:
            del self._names[session]

    def ended(self, session: int) -> None:
        """A session ended, and holds nothing any more."""
        self._names.pop(session, None)

    def infos(self) -> list[Holder]:
        """One for each session."""
        return [
            Holder(kind="mapping", detail=f"session {session}: {', '.join(sorted(names))}")
            for session, names in tuple(self._names.items())
        ]

    def keep(self) -> list[tuple[int, list[str]]]:
        """Describe them."""
        return [(session, sorted(names)) for session, names in self._names.items()]

    def adopt(self, state: Iterable[tuple[int, Iterable[str]]]) -> None:
        """Have what :meth:`keep` described."""
        self._names = {session: set(names) for session, names in state}
