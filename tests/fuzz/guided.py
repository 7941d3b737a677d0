"""A small coverage-guided fuzzer: keeps every input that reaches what no input reached before, and mutates those.

For machines without atheris. It sees the modules it is told to look at, nothing else, and is repeatable: the same seed
makes the same run. Coverage comes from ``sys.monitoring`` where Python has it (3.12), which costs nothing once a place
was seen; else from ``sys.settrace``.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

__all__ = ["Guided"]

INTERESTING = (
    *(0, 1, 2, 7, 8, 15, 16, 17, 0x7F, 0x80, 0xFF, 0x100, 0x7FF, 0x800, 0xFFF, 0x1000, 0x7FFF, 0xFFFF),
    *(0x10_0000, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, 1 << 63, (1 << 64) - 2, (1 << 64) - 1),
)

MOST_BYTES = 20_000
"""Of a mutated input. What takes more is in the corpus."""

Place = tuple[CodeType, int, int]
"""Code, and a step within it: from one line (``sys.settrace``) or instruction to another."""


class Guided:
    """One run.

    Args:
        target: raises for what it does not like.
        seeds: what to begin with; each is tried, even one that reaches nothing new.
        modules: prefixes of the modules that count.
        seed: of the mutations.

    Attributes:
        places: what was reached.
        kept: the inputs that reached something first.
        tried: how many inputs there have been.

    """

    def __init__(
        self, target: Callable[[bytes], None], seeds: list[bytes], *, modules: tuple[str, ...], seed: int = 0
    ) -> None:
        self._target = target
        self._random = random.Random(seed)
        self._coverage = _Monitoring(modules) if hasattr(sys, "monitoring") else _Tracing(modules)
        self.kept: list[bytes] = []
        self.tried = 0
        self.feed(seeds)

    @property
    def places(self) -> set[Place]:
        """What was reached."""
        return self._coverage.places

    def feed(self, inputs: list[bytes]) -> None:
        """Try these. Raises what the target raises, with the input in a note."""
        with self._coverage:
            for one in inputs:
                self._try(one)

    def run(self, inputs: int) -> None:
        """Try so many. Raises what the target raises, with the input in a note."""
        with self._coverage:
            for _ in range(inputs):
                self._try(self._mutated(self._chosen()))

    def _chosen(self) -> bytes:
        """One to mutate: the shorter of two is tried sooner, and what is long (it is slow) hardly ever."""
        return min(self._random.choice(self.kept), self._random.choice(self.kept), key=len)

    def _try(self, data: bytes) -> None:
        self.tried += 1
        before = len(self.places)
        try:
            self._coverage.watch(self._target, data)
        except BaseException as error:
            error.add_note(f"input: x {data.hex()}")
            raise
        if len(self.places) > before or not self.kept:
            self.kept.append(data)

    def _mutated(self, data: bytes) -> bytes:
        rng, out = self._random, bytearray(data[:MOST_BYTES])
        for _ in range(1 << rng.randrange(4)):
            how, at = rng.randrange(8), rng.randrange(len(out) + 1)
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
            elif how == 6:
                other = rng.choice(self.kept)
                begin = rng.randrange(len(other) + 1)
                out[at:at] = other[begin : begin + rng.randrange(1, 64)]
            elif at < len(out):
                out[at] = rng.randrange(256)
        return bytes(out[:MOST_BYTES])


class _Tracing:
    """Pairs of lines, by ``sys.settrace``: which branch was taken, not only where it led."""

    def __init__(self, modules: tuple[str, ...]) -> None:
        self.places: set[Place] = set()
        self._modules = modules
        self._looked_at: dict[CodeType, bool] = {}

    def __enter__(self) -> None:
        """Nothing: between inputs nothing is traced."""

    def __exit__(self, *_: object) -> None:
        """Nothing."""

    def watch(self, target: Callable[[bytes], None], data: bytes) -> None:
        seen = self.places
        former = [0]

        def local(frame: FrameType, event: str, argument: Any) -> Any:
            del argument
            if event == "line":
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
            target(data)
        finally:
            sys.settrace(before)


class _Monitoring:
    """Lines and branches, by ``sys.monitoring``: each is reported until it is known, and never again."""

    def __init__(self, modules: tuple[str, ...]) -> None:
        self.places: set[Place] = set()
        self._parts = tuple(one.replace(".", "/") for one in modules)
        self._ways: dict[tuple[CodeType, int], set[int]] = {}
        self._api: Any = sys.monitoring  # type: ignore[attr-defined,unused-ignore]

    def __enter__(self) -> None:
        api, events = self._api, self._api.events
        api.use_tool_id(api.COVERAGE_ID, "vfiod-fuzz")
        api.register_callback(api.COVERAGE_ID, events.LINE, self._line)
        api.register_callback(api.COVERAGE_ID, events.BRANCH, self._branch)
        api.set_events(api.COVERAGE_ID, events.LINE | events.BRANCH)

    def __exit__(self, *_: object) -> None:
        self._api.set_events(self._api.COVERAGE_ID, 0)
        self._api.free_tool_id(self._api.COVERAGE_ID)

    def watch(self, target: Callable[[bytes], None], data: bytes) -> None:
        target(data)

    def _line(self, code: CodeType, number: int) -> Any:
        if self._wanted(code):
            self.places.add((code, 0, number))
        return self._api.DISABLE

    def _branch(self, code: CodeType, begin: int, end: int) -> Any:
        if not self._wanted(code):
            return self._api.DISABLE
        ways = self._ways.setdefault((code, begin), set())
        ways.add(end)
        self.places.add((code, begin, end))
        return self._api.DISABLE if len(ways) > 1 else None

    def _wanted(self, code: CodeType) -> bool:
        return any(one in code.co_filename for one in self._parts)
