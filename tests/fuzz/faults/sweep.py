"""Runs an operation well once, then with each of its calls failing in each plausible way, and compares.

What must hold after each run (``judge``):

* The operation was refused: by a :class:`~vfiod.protocol.errors.CommandError` that is no defect of ours and names what
  it is about; and the picture is what it was before, and no event was sent.
* Or it succeeded all the same: then the picture is that of the good run.
* Nothing was logged with a traceback, no task failed unheard.
* The operation succeeds when it is tried again without a fault, and the picture is that of the good run.
* At the end nothing is left: no fd, nothing open in the kernel.
"""

from __future__ import annotations

import asyncio
import gc
import re
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from tests.fuzz.faults.bench import Bench, open_fds
from tests.fuzz.faults.exceptions import Reason, excused
from tests.fuzz.faults.injector import Call, Fault, Injector, short_of_fds

from vfiod.protocol.errors import CommandError, InternalError

__all__ = ["Good", "Operation", "difference", "good_run", "starve", "sweep_one"]

Step = Callable[[Bench], Awaitable[Any]]


@dataclass(frozen=True)
class Operation:
    """One thing a manager or a hypervisor does.

    Attributes:
        name: for the tables.
        prepare: brings a fresh machine to where it can be done; may be called in part again before a second try.
        run: does it; may be called again when it was refused.
        names: one of these words is in every refusal.
        again: whether it is tried again after it was refused.
        starves: whether it can be run with too few fds: not when its peers are in this process.

    """

    name: str
    prepare: Step
    run: Step
    names: tuple[str, ...]
    again: bool = True
    starves: bool = True

    def __str__(self) -> str:
        return self.name


@dataclass
class Good:
    """What a run without faults did."""

    calls: list[Call]
    picture: dict[str, Any]
    events: list[str]


@dataclass
class Outcome:
    """What one run did."""

    refusal: CommandError | None
    complaints: list[str]
    excuse: str | None = None
    after: dict[str, Any] = field(default_factory=dict)


def difference(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two pictures differ, in words."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = sorted({*one, *other}, key=str)
        return [
            line
            for key in keys
            for line in difference(one.get(key), other.get(key), f"{where}/{key}")
            if one.get(key) != other.get(key)
        ]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = zip(one, other, strict=True)
        return [line for n, (a, b) in enumerate(pairs) if a != b for line in difference(a, b, f"{where}[{n}]")]
    return [] if one == other else [f"{where}: {one!r} != {other!r}"]


def _events(bench: Bench, since: int) -> list[str]:
    return [type(data).__name__ for data in bench.told[since:]]


def good_run(operation: Operation) -> Good:
    """Learn what calls an operation makes, and what comes of it."""

    async def main() -> Good:
        bench = Bench()
        try:
            await operation.prepare(bench)
            await bench.settle()
            since = len(bench.told)
            injector = Injector()
            with injector.armed():
                await operation.run(bench)
                await bench.settle()
            picture = await bench.picture()
            return Good(injector.calls, picture, _events(bench, since))
        finally:
            problems = await bench.end()
            assert not problems, problems
            assert not bench.log.defects, bench.log.defects

    return asyncio.run(main())


def sweep_one(operation: Operation, good: Good, fault: Fault) -> Outcome:
    """One run in which a call fails."""
    return _run(operation, good, Injector(fault), None)


def starve(operation: Operation, good: Good, left: int) -> Outcome:
    """One run in which this process can open so many fds and no more."""
    return _run(operation, good, Injector(), left)


def _run(operation: Operation, good: Good, injector: Injector, left: int | None) -> Outcome:
    label = f"fds={left}" if left is not None else str(injector.fault)
    before_all = open_fds()
    complaints: list[str] = []
    reason: Reason | None = None

    after: dict[str, Any] = {}

    async def main() -> CommandError | None:
        nonlocal reason, after
        bench = Bench()
        refusal: CommandError | None = None
        try:
            await operation.prepare(bench)
            before = await bench.picture()
            since = len(bench.told)
            try:
                with injector.armed(), short_of_fds(left) if left is not None else nullcontext():
                    try:
                        await operation.run(bench)
                    finally:
                        await bench.settle()
            except CommandError as error:
                refusal = error
            except Exception as error:
                complaints.append(f"raised {error!r}")
                return None
            after = await bench.picture()
            events = _events(bench, since)
            found: list[str] = []
            if refusal is not None:
                if isinstance(refusal, InternalError):
                    complaints.append(f"a defect: {refusal}")
                if not any(word in str(refusal) for word in operation.names):
                    complaints.append(f"the refusal names none of {operation.names}: {refusal}")
                found += [f"left: {one}" for one in difference(before, after)]
                found += [f"refused, but told {events}"] if events else []
                if operation.again:
                    found += await _again(bench, operation, good)
            else:
                found += [f"done otherwise: {one}" for one in difference(good.picture, after)]
                found += [f"told {events} instead of {good.events}"] if events != good.events else []
            reason = excused(operation.name, injector.fault, refusal, found) if found else None
            parts = () if reason is None else reason.parts
            complaints.extend(one for one in found if not any(re.search(part, one) for part in parts))
        finally:
            complaints.extend(f"at the end: {one}" for one in await bench.end())
            complaints.extend(f"logged: {one}" for one in bench.log.defects)
        return refusal

    refusal = asyncio.run(main())
    left_over = open_fds()
    if left_over != before_all:
        complaints.append(f"fds left: {dict(left_over - before_all)}, gone: {dict(before_all - left_over)}")
    gc.collect(0)
    why = None if reason is None else reason.why
    return Outcome(refusal, [f"{operation.name} {label}: {one}" for one in complaints], why, after)


async def _again(bench: Bench, operation: Operation, good: Good) -> list[str]:
    try:
        await operation.run(bench)
    except Exception as error:
        return [f"a second try failed: {error!r}"]
    return [f"after a second try: {one}" for one in difference(good.picture, await bench.picture())]
