"""The monitor and the watch over a bus: the same, with events from the bus's other socket where one is named."""

from __future__ import annotations

import asyncio
import contextlib
from types import TracebackType
from typing import Final, Self

from vfiod.client.bus import AsyncBus, EventReader, Keys
from vfiod.client.errors import ConnectFailed, RequestTimedOut
from vfiod.client.events import Event

__all__ = ["BusClient"]

GREETING_SECONDS: Final = 5.0
"""ZeroMQ does not say that nobody is there: whoever does not tell its name in this time is not."""


class BusClient(AsyncBus):
    """A bus with what the monitor expects of a connection. :meth:`connect` makes one.

    ZeroMQ connects again by itself, so this one is never lost: a server that is away shows as calls that time out.
    """

    version = None
    _events = ""
    _keys: Keys | None = None

    @classmethod
    async def connect(cls, address: str, *, events: str = "", keys: Keys | None = None) -> Self:
        """Connect, and see that somebody answers.

        Args:
            address: ``ipc:PATH`` or ``tcp:HOST:PORT`` of ``--bus``.
            events: the same of ``--events``; empty: no events.
            keys: for ``tcp:``.

        Raises:
            ConnectFailed: nobody answers. ValueError: an address or key that is none.

        """
        client = cls(address, keys=keys)
        client._events, client._keys = events, keys
        try:
            await client.query_name(timeout=GREETING_SECONDS)
        except RequestTimedOut as error:
            await client.close()
            hint = "" if keys is None else ", when it has our key in --bus-clients and its own is the one given here"
            raise ConnectFailed(f"Nobody answers on {address}; 'vfiod serve --bus {address}' does{hint}") from error
        except BaseException:
            await client.close()
            raise
        return client

    def events(self) -> BusEvents:
        """The events from now on; none where no address was given."""
        return BusEvents(self._events, self._keys)


class BusEvents:
    """Events of a bus, to iterate over."""

    def __init__(self, address: str, keys: Keys | None = None) -> None:
        self._reader = EventReader(address, keys=keys) if address else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._reader is not None:
            self._reader.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        return await self.get()

    async def get(self, timeout: float | None = None) -> Event:  # noqa: ASYNC109 - the same argument as elsewhere
        """The next event. Raises RequestTimedOut after so many seconds, None: never."""
        if self._reader is not None:
            return await self._reader.get(timeout)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await asyncio.get_running_loop().create_future()  # until cancelled
        raise RequestTimedOut("There are no events without an address of them")
