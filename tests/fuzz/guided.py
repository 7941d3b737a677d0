"""A small coverage-guided fuzzer: keeps every input that reaches a line no input reached before, and mutates those.

For machines without atheris. It sees the lines of the modules it is told to look at, nothing else, and is repeatable:
the same seed makes the same run.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

__all__ = ["Guided"]

INTERESTING = (
    0,
    1,
    7,
    8,
    15,
    16,
    17,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    0x10_0000,
    0x7FFF_FFFF,
    0xFFFF_FFFF,
    (1 << 64) - 1,
)


class Guided:
    """One run.

    Args:
        target: raises for what it does not like.
        seeds: what to begin with.
        modules: prefixes of the modules whose lines count.
        seed: of the mutations.

    """

    def __init__(self, target: Callable[[bytes], None], seeds: list[bytes], *, modules: str, seed: int = 0) -> None:
        self._target = target
        self._modules = modules
        self._random = random.Random(seed)
        self._looked_at: dict[CodeType, bool] = {}
        self.lines: set[tuple[CodeType, int, int]] = set()
        self.kept: list[bytes] = []
        for one in seeds:
            self._try(one)

    def run(self, inputs: int) -> None:
        """Try so many. Raises what the target raises, with the input in a note."""
        for _ in range(inputs):
            self._try(self._mutated(self._random.choice(self.kept)))

    def _try(self, data: bytes) -> None:
        new = self._covered(data) - self.lines
        if new or not self.kept:
            self.lines |= new
            self.kept.append(data)

    def _covered(self, data: bytes) -> set[tuple[CodeType, int, int]]:
        seen: set[tuple[CodeType, int, int]] = set()
        former: list[int] = [0]

        def local(frame: FrameType, event: str, argument: Any) -> Any:
            del argument
            if event == "line":  # pairs of lines: which branch was taken, not only where it led
                seen.add((frame.f_code, former[0], frame.f_lineno))
                former[0] = frame.f_lineno
            return local

        def enter(frame: FrameType, event: str, argument: Any) -> Any:
            del event, argument
            code = frame.f_code
            wanted = self._looked_at.get(code)
            if wanted is None:
                wanted = self._looked_at[code] = str(frame.f_globals.get("__name__", "")).startswith(self._modules)
            return local if wanted else None

        before = sys.gettrace()
        sys.settrace(enter)
        try:
            self._target(data)
        except BaseException as error:
            error.add_note(f"input: {data.hex()}")
            raise
        finally:
            sys.settrace(before)
        return seen

    def _mutated(self, data: bytes) -> bytes:
        rng, out = self._random, bytearray(data)
        for _ in range(1 << rng.randrange(4)):
            how, at = rng.randrange(7), rng.randrange(len(out) + 1)
            if how == 0 and at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            elif how == 1:
                width = rng.choice((1, 2, 4, 8))
                number = rng.choice(INTERESTING) & ((1 << 8 * width) - 1)
                out[at : at + width] = number.to_bytes(width, rng.choice(("little", "big")))
            elif how == 2:
                del out[at : at + rng.randrange(1, 20)]
            elif how == 3:
                out[at:at] = rng.randbytes(rng.randrange(1, 20))
            elif how == 4:
                out[at:at] = out[at : at + rng.randrange(1, 64)]
            elif how == 5:
                other = rng.choice(self.kept)
                out[at:] = other[rng.randrange(len(other) + 1) :]
            elif at < len(out):
                out[at] = rng.randrange(256)
        return bytes(out[:20_000])
