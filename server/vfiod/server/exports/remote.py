"""Memory that only the client can reach: DMA by messages (DMA_READ, DMA_WRITE), for devices written in Python.

A device asks in a worker's thread and waits there; the question and the answer pass through the loop. On the loop's
own thread nobody may wait: as long as a client has memory of this kind, each register access in which the device may
do DMA (``MediatedDevice.may_dma``) is therefore handed to a thread, and its reply waits for it. What a device does of
itself on the loop (a callback of ``Host.watch``) cannot reach such memory.
"""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Final, Protocol

from vfiod.protocol.errors import OperationFailed
from vfiod.protocol.limits import VFIO_USER_DMA_TIMEOUT_MS
from vfiod.protocol.vfio_user import DmaData, DmaRead, DmaWrite, DmaWritten, Payload

if TYPE_CHECKING:
    from vfiod.server.kernel.pins import PinnedMemory

__all__ = ["Asker", "RemoteMemory"]


class Asker(Protocol):
    """The session, as far as it asks its client. Called on the loop; the future is answered there."""

    @property
    def max_transfer(self) -> int:
        """Bytes of one message."""

    def ask(self, payload: Payload, answer: Future[Payload]) -> None:
        """Send a request; the reply's body answers."""

    def forget(self, answer: Future[Payload]) -> None:
        """Nobody waits for it any more."""


class RemoteMemory:
    """A client's memory, by its addresses (:class:`~vfiod.server.backends.base.GuestFile`).

    Args:
        name: for messages.
        loop: where the session lives. This is made on its thread.
        asker: the session.

    """

    readonly = False
    closed = False
    asks = True
    size = 1 << 64

    def __init__(self, name: str, loop: asyncio.AbstractEventLoop, asker: Asker) -> None:
        self.name = name
        self._loop = loop
        self._asker = asker
        self._thread: Final = threading.get_ident()

    @property
    def number(self) -> int:
        """There is none. OperationFailed."""
        raise self._nothing()

    is_mapped = False

    def address(self) -> int:
        """There is none. OperationFailed."""
        raise self._nothing()

    def unmap(self) -> None:
        """There is none."""

    def pin(self, offset: int, length: int, *, writable: bool) -> PinnedMemory:
        """It cannot be. OperationFailed."""
        raise self._nothing()

    def _nothing(self) -> OperationFailed:
        advice = "it came without a file: share the guest's memory (QEMU: share=on)"
        return OperationFailed("map", self.name, errno="ENOTSUP", advice=advice)

    def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes from address ``offset``. Waits; OperationFailed: refused, too late, or gone."""
        parts: list[bytes] = []
        at, end, step = offset, offset + length, self._asker.max_transfer
        while at < end:
            count = min(step, end - at)
            reply = self._ask("DMA_READ", at, count, DmaRead(at, count))
            if not isinstance(reply, DmaData) or reply.address != at or len(reply.data) != count:
                raise self._short("DMA_READ", at, count)
            parts.append(reply.data)
            at += count
        return b"".join(parts)

    def write(self, offset: int, data: bytes) -> None:
        """Write all of it at address ``offset``. Waits; OperationFailed."""
        step = self._asker.max_transfer
        for start in range(0, len(data), step):
            part, at = data[start : start + step], offset + start
            reply = self._ask("DMA_WRITE", at, len(part), DmaWrite(at, part))
            # QEMU answers with a header alone.
            if not isinstance(reply, DmaWritten) or reply.count not in (None, len(part)):
                raise self._short("DMA_WRITE", at, len(part))

    def _short(self, operation: str, address: int, count: int) -> OperationFailed:
        advice = "the client answered for another range"
        return OperationFailed(operation, self._what(address, count), errno="EPROTO", advice=advice)

    def _what(self, address: int, count: int) -> str:
        return f"{self.name} ({count} bytes at 0x{address:x})"

    def _ask(self, operation: str, address: int, count: int, payload: Payload) -> Payload:
        what = self._what(address, count)
        if threading.get_ident() == self._thread:
            advice = "it was asked for on the event loop, where nobody may wait for a client"
            raise OperationFailed(operation, what, errno="EDEADLK", advice=advice)
        answer: Future[Payload] = Future()
        try:
            self._loop.call_soon_threadsafe(self._asker.ask, payload, answer)
        except RuntimeError:
            raise OperationFailed(operation, what, errno="ENOTCONN", advice="the server ends") from None
        try:
            return answer.result(VFIO_USER_DMA_TIMEOUT_MS / 1000)
        except TimeoutError:
            self._loop.call_soon_threadsafe(self._asker.forget, answer)
            advice = f"the client did not answer within {VFIO_USER_DMA_TIMEOUT_MS} ms"
            raise OperationFailed(operation, what, errno="ETIMEDOUT", advice=advice) from None

    def close(self) -> None:
        """Nothing is open."""
