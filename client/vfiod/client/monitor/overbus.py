"""The monitor over a bus: the same lines, with events from the bus's other socket where one is named."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Final, Self

from vfiod.client.bus import AsyncBus, EventReader
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

    @classmethod
    async def connect(cls, address: str, *, events: str = "") -> Self:
        """Connect, and see that somebody answers.

        Args:
            address: ``ipc:PATH`` of ``--bus``.
            events: ``ipc:PATH`` of ``--events``; empty: no events.

        Raises:
            ConnectFailed: nobody answers.

        """
        client = cls(address)
        client._events = events
        try:
            await client.query_name(timeout=GREETING_SECONDS)
        except RequestTimedOut as error:
            await client.close()
            raise ConnectFailed(f"Nobody answers on {address}; 'vfiod serve --bus {address}' does") from error
        except BaseException:
            await client.close()
            raise
        return client

    def events(self) -> BusEvents:
        """The events from now on; none where no address was given."""
        return BusEvents(self._events)


class BusEvents:
    """Events of a bus, to iterate over."""

    def __init__(self, address: str) -> None:
        self._reader = EventReader(address) if address else None

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
        if self._reader is None:
            await asyncio.get_running_loop().create_future()  # until cancelled
        assert self._reader is not None  # noqa: S101 - nothing ends that wait but being cancelled
        return await self._reader.get()
