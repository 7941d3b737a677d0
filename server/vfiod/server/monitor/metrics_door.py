"""The door of metrics: just enough HTTP for a scraper, on a Unix socket or on this host alone.

``GET /metrics`` gives the text of :mod:`vfiod.server.monitor.metrics`. One request per connection (RFC 9112, section
9.6); who is slow to ask is hung up on.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from typing import Final

from vfiod.protocol.limits import MAX_SCRAPE_REQUEST, MAX_SCRAPER_CONNECTIONS, MAX_SCRAPERS, SCRAPE_TIMEOUT_MS
from vfiod.server.monitor.metrics import CONTENT_TYPE
from vfiod.server.sockets import listener
from vfiod.server.sockets.access import Access, peer_of
from vfiod.server.sockets.listener import ListenError

__all__ = ["MetricsDoor"]

_log: Final = logging.getLogger(__name__)

PLAIN: Final = "text/plain; charset=utf-8"


class MetricsDoor:
    """Answers scrapers.

    Args:
        access: who may come in by the Unix socket. By TCP anybody on this host may: metrics hold names and numbers.
        text: gives all metrics as they are now.

    """

    def __init__(self, access: Access, text: Callable[[], str]) -> None:
        self._access: Final = access
        self._text: Final = text
        self._server: asyncio.Server | None = None
        self._file: listener.SocketFile | None = None
        self._open: Final[dict[asyncio.StreamWriter, None]] = {}  # oldest first
        self._asked: Final[dict[asyncio.StreamWriter, None]] = {}  # those of them that are being answered

    async def listen_path(self, path: str, gid: int | None) -> None:
        """Listen on a Unix socket, 0600 or 0660. Raises ListenError."""
        self._server = await asyncio.start_unix_server(
            self._serve, sock=listener.open_path(path, gid), limit=MAX_SCRAPE_REQUEST
        )
        self._file = listener.SocketFile(path)

    async def listen_tcp(self, host: str, port: int) -> None:
        """Listen on the loopback interface. Raises ListenError."""
        try:
            self._server = await asyncio.start_server(self._serve, host, port, limit=MAX_SCRAPE_REQUEST)
        except OSError as error:
            raise ListenError(f"Cannot serve metrics on {host}:{port}: {os.strerror(error.errno or 0)}") from error

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _join(self._open, writer, MAX_SCRAPER_CONNECTIONS)
        try:
            async with asyncio.timeout(SCRAPE_TIMEOUT_MS / 1000):
                writer.write(await self._answer(reader, writer))
                await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            _log.debug("A scraper was hung up on: %r", error)
        finally:
            self._open.pop(writer, None)
            self._asked.pop(writer, None)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        # Refusals too wait for the request: who is hung up on while it asks may never read the answer.
        head = await reader.readuntil(b"\r\n\r\n")
        connection = writer.get_extra_info("socket")
        if connection.family == socket.AF_UNIX:
            refusal = self._access.refusal(peer_of(connection))
            if refusal is not None:
                return _response("403 Forbidden", refusal)
        _join(self._asked, writer, MAX_SCRAPERS)
        words = head.split(b"\r\n", 1)[0].split(b" ")
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            return _response("400 Bad Request", "Ask in HTTP/1.1: GET /metrics")
        method, target = words[0], words[1].partition(b"?")[0]
        if target not in (b"/metrics", b"/"):
            return _response("404 Not Found", "Metrics are at /metrics")
        if method not in (b"GET", b"HEAD"):
            return _response("405 Method Not Allowed", "Metrics can be read: GET /metrics", "Allow: GET, HEAD")
        return _response("200 OK", self._text(), kind=CONTENT_TYPE, body=method == b"GET")

    async def close(self) -> None:
        """Answer nobody any more; the socket file goes."""
        if self._server is not None:
            self._server.close()
            if self._file is not None:
                self._file.remove()
            self._server = None


def _join(those: dict[asyncio.StreamWriter, None], writer: asyncio.StreamWriter, most: int) -> None:
    """One more; the oldest is hung up on when there are too many. So a crowd that idles keeps nobody out."""
    those[writer] = None
    if len(those) > most:
        oldest = next(iter(those))
        del those[oldest]
        oldest.transport.abort()


def _response(status: str, text: str, *headers: str, kind: str = PLAIN, body: bool = True) -> bytes:
    payload = text.encode(errors="replace")
    lines = [
        f"HTTP/1.1 {status}",
        f"Content-Type: {kind}",
        f"Content-Length: {len(payload)}",
        "Connection: close",
        *headers,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + (payload if body else b"")
