"""``python -m tests.bench [--scale N] [--only WORD]``: prints a table; never fails because of a time."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from types import ModuleType

from tests.bench import (
    bus,
    channel,
    devices,
    exports,
    fuzzing,
    kernel,
    mediated,
    monitor,
    platforms,
    sandbox,
    served,
    store,
    subchannel,
    takeover,
    vectors,
)
from tests.bench.measuring import Line
from tests.bench.processes import ROOT

for part in ("protocol", "server", "client"):
    sys.path.append(str(ROOT / part))

PARTS = (
    *(monitor, devices, bus, vectors, platforms, channel, exports),
    *(served, mediated, fuzzing, sandbox, takeover, store),
)
#: Each inside a machine of the lab, and by name only: why there is none elsewhere.
LAB = {
    kernel: "This is not the lab's machine 'bench': make bench-lab",
    subchannel: "This is not the lab's s390x machine: python -m tests.lab run ccw",
}


def name_of(part: ModuleType) -> str:
    """What ``--only`` calls it."""
    return part.__name__.rpartition(".")[2]


def main() -> None:
    """Measure, and print each line as it is known."""
    parser = argparse.ArgumentParser(prog="tests.bench", description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="longer (2) or shorter (0.4) than usual")
    parser.add_argument("--only", choices=[name_of(part) for part in (*PARTS, *LAB)], help="one part")
    arguments = parser.parse_args()
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    where = f"Python {sys.version.split()[0]}, Linux {os.uname().release}, one core of {os.cpu_count()}"
    print(f"{where}; medians of paired runs\n")
    print(f"{'what':<72} {'measured':>11} {'budget':>11}  meets")
    for line in _lines(arguments.only, arguments.scale):
        print(_row(line), flush=True)


def _lines(only: str | None, scale: float) -> Iterator[Line]:
    for part in PARTS:
        if only in (None, name_of(part)):
            yield from part.lines(scale)
    for part, elsewhere in LAB.items():
        if only == name_of(part):
            if not part.available():
                raise SystemExit(elsewhere)
            yield from part.lines(scale)


def _row(line: Line) -> str:
    measured = "" if line.value is None else f"{line.value:.3g}{line.unit}"
    budget = "" if line.budget is None else f"{'>=' if line.at_least else '<='} {line.budget:g}{line.unit}"
    meets = {True: "yes", False: "NO", None: "-"}[line.meets]
    return f"{line.what:<72} {measured:>11} {budget:>11}  {meets:<5}{line.note}".rstrip()


if __name__ == "__main__":
    main()
