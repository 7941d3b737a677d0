"""Finding parents: those that come with vfiod, and those of other packages, by their entry points.

Each is loaded by itself: one that cannot be loaded, or that hangs while it is imported, is named in the log and in the
errors of those who ask for it, and keeps no other from being found.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from functools import partial
from typing import Any, Final, TypeVar

from vfiod.protocol.errors import CommandError, InvalidArgument
from vfiod.server.mdev.parent import MdevType
from vfiod.server.mdev.registered import CallLimits, Registered

__all__ = ["Discovery", "find_type"]

_log: Final = logging.getLogger(__name__)

T = TypeVar("T")


class Discovery:
    """Finds parents, once, when they are first asked for. On the loop's thread; it works in the others.

    Args:
        built_in: the parents that come with vfiod, ``name: "module:attribute"``.
        group: the group of entry points; None: none.
        executor: of the machine.
        limits: how parents are called; importing one counts as a call.
        admit: takes each that was found; raises CommandError when it cannot be taken.

    Attributes:
        broken: what could not be loaded, by the name of its entry point: why.

    """

    def __init__(
        self,
        built_in: Mapping[str, str],
        group: str | None,
        executor: Executor,
        limits: CallLimits,
        admit: Callable[[Registered], None],
    ) -> None:
        self.broken: dict[str, str] = {}
        self._places = built_in
        self._group = group
        self._executor = executor
        self._limits = limits
        self._admit = admit
        self._first: asyncio.Task[None] | None = None
        self._all: asyncio.Task[None] | None = None

    async def built_in(self) -> None:
        """Until the built-in parents are there."""
        if self._first is None:
            self._first = asyncio.get_running_loop().create_task(self._load_built_in())
        await asyncio.shield(self._first)

    async def everything(self) -> None:
        """Until all parents are there, or have failed."""
        if self._all is None:
            self._all = asyncio.get_running_loop().create_task(self._load_all())
        await asyncio.shield(self._all)

    async def _load_built_in(self) -> None:
        await self._load([(name, f"built-in '{name}'", where) for name, where in self._places.items()])

    async def _load_all(self) -> None:
        await self.built_in()
        if self._group is not None:
            await self._load(await self._in_thread(partial(_entry_points, self._group)))

    async def _load(self, places: list[tuple[str, str, str]]) -> None:
        # All at once: one that hangs while it is imported holds up none but those who want it.
        loading = [self._in_thread(partial(self._loaded, origin, where)) for _, origin, where in places]
        for (name, _, _), future in zip(places, loading, strict=True):
            try:
                self._admit(await future)
            except CommandError as error:
                self.broken[name] = f"{error} ({_cause(error)})" if error.__cause__ is not None else str(error)
                _log.error("%s", self.broken[name])

    def _loaded(self, origin: str, where: str) -> Registered:
        def load() -> Registered:
            module, _, attribute = where.partition(":")
            factory: Any = importlib.import_module(module.strip())
            for part in attribute.partition("[")[0].strip().split("."):
                factory = getattr(factory, part)
            return Registered(factory(), self._executor, self._limits)

        what = f"mdev parent of {origin} ({where})"
        return self._limits.of(what).run("load", what, load)

    def _in_thread(self, work: Callable[[], T]) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._executor, work)


def _entry_points(group: str) -> list[tuple[str, str, str]]:
    """Name, origin and place of each parent that another package offers."""
    from importlib.metadata import entry_points  # slow to import, and needed only here

    return [
        (point.name, f"entry point '{point.name}' of {'?' if point.dist is None else point.dist.name}", point.value)
        for point in entry_points(group=group)
    ]


def _cause(error: BaseException) -> str:
    """The first line of what was raised: for whoever installed it."""
    cause = error.__cause__
    words = str(cause).splitlines() or [""]
    return f"{type(cause).__name__}: {words[0][:200]}"


def find_type(
    name: str, parents: Iterable[Registered], known: Callable[[], str], broken: Mapping[str, str]
) -> tuple[Registered, MdevType]:
    """The one type of this name: ``TYPE``, or ``PARENT/TYPE`` where several parents have it.

    Raises InvalidArgument, which says what there is.
    """
    parent, _, wanted = name.rpartition("/")
    candidates = [
        (record, record.types[wanted]) for record in parents if wanted in record.types and parent in ("", record.name)
    ]
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        names = ", ".join(f"{record.name}/{wanted}" for record, _ in candidates)
        raise InvalidArgument(f"Several parents have a type '{wanted}': name one of {names}")
    if parent in broken:
        raise InvalidArgument(f"Mediated device type '{name}' not found: {broken[parent]}")
    raise InvalidArgument(f"Mediated device type '{name}' not found; {known()}")
