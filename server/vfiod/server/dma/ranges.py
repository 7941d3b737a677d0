"""Ranges of addresses: where the space ends, and how a message names one."""

from __future__ import annotations

from typing import Final

__all__ = ["END_OF_SPACE", "words"]

END_OF_SPACE: Final = 1 << 64
"""The address after the last."""


def words(first: int, size: int) -> str:
    """A range for a message: the first address and the last."""
    return f"{first:#x} to {first + size - 1:#x}"
