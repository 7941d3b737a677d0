"""Splits a byte stream into JSON texts (QEMU ``qobject/json-lexer.c`` and ``json-streamer.c``)."""

from __future__ import annotations

from typing import Final

from vfiod.protocol.errors import WireError
from vfiod.protocol.limits import MAX_MESSAGE_BYTES, MAX_NESTING

__all__ = ["JsonStream"]

_SKELETON: Final = True


class JsonStream:
    """The incremental splitter of one session's input."""

    def __init__(self, *, max_message_bytes: int = MAX_MESSAGE_BYTES, max_nesting: int = MAX_NESTING) -> None:
        self._max_message_bytes = max_message_bytes
        self._max_nesting = max_nesting

    def receive_data(self, data: bytes) -> list[bytes | WireError]:
        """Take what one read gave; return the texts that are complete now, in order, errors in their place."""
        return [data] if data.strip() else []

    def buffered(self) -> int:
        """Bytes of the text that is not complete yet."""
        return 0
