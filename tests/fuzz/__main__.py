"""The long run: ``python -m tests.fuzz [--seconds N] [--keep DIR] [TARGET...]``, all targets by default.

With atheris (libFuzzer) when it is installed, else by the fuzzer of our own. Prints for each target how many inputs
were tried, how many in a second, and what was reached; ends with 1 when something was found, and says with which input:
that goes into the target's file in ``corpus``. ``--keep`` collects, from run to run, the inputs that reached something
new.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from tests.fuzz.guided import Guided

BATCH = 50
"""Inputs between two looks at the clock."""


def main() -> int:
    """Run, and say what came of it."""
    from tests.fuzz.targets import TARGETS

    parser = argparse.ArgumentParser(prog="tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], metavar="TARGET", help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--seconds", type=float, default=30.0, help="for each target (30)")
    parser.add_argument("--keep", type=Path, help="collect inputs in this directory")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the mutations (the time)")
    parser.add_argument("--own", action="store_true", help="our own fuzzer, even where atheris is installed")
    given = parser.parse_args()
    atheris = not given.own and importlib.util.find_spec("atheris") is not None
    print(f"{'atheris' if atheris else 'our own fuzzer'}, seed {given.seed}, Python {sys.version.split()[0]}")
    found = 0
    for name in given.targets or TARGETS:
        run = _with_atheris if atheris else _ours
        found += run(name, given.seconds, given.seed, None if given.keep is None else given.keep / name)
    print(f"{found} found" if found else "nothing found")
    return int(found > 0)


def _ours(name: str, seconds: float, seed: int, keep: Path | None) -> int:
    from tests.fuzz.targets import TARGETS

    target = TARGETS[name]
    seeds = target.seeds() + ([] if keep is None else [one.read_bytes() for one in sorted(keep.glob("*"))])
    begun, error = time.monotonic(), None
    try:
        run = Guided(target.run, seeds, modules=target.modules, seed=seed)
    except Exception:
        print(f"{name}: the corpus itself breaks it\n{traceback.format_exc()}")
        return 1
    at_first = len(run.places)
    try:
        while time.monotonic() - begun < seconds:
            run.run(BATCH)
    except Exception:
        error = traceback.format_exc()
    spent = time.monotonic() - begun
    print(
        f"{name:<20} {run.tried:>9} inputs {run.tried / spent:>8.0f}/s  places {at_first} -> {len(run.places)}, "
        f"{len(run.kept)} inputs kept",
        flush=True,
    )
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        for number, one in enumerate(run.kept):
            (keep / f"{number:05}").write_bytes(one)
    if error is not None:
        print(error)
    return int(error is not None)


def _with_atheris(name: str, seconds: float, seed: int, keep: Path | None) -> int:
    """libFuzzer ends the process that it runs in: each target has its own."""
    with tempfile.TemporaryDirectory() as place:
        where = Path(place) if keep is None else keep
        where.mkdir(parents=True, exist_ok=True)
        code = f"from tests.fuzz.__main__ import libfuzzer; libfuzzer({name!r})"
        options = [str(where), f"-max_total_time={int(seconds)}", f"-seed={seed % (1 << 32)}", "-print_final_stats=1"]
        print(f"{name}:", flush=True)
        return int(subprocess.run([sys.executable, "-c", code, *options], check=False).returncode != 0)


def libfuzzer(name: str) -> None:
    """Hand one target to atheris, with the command line's other words as libFuzzer's own."""
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["vfiod"]):
        from tests.fuzz.targets import TARGETS

        target = TARGETS[name]
    for number, one in enumerate(target.seeds()):
        (Path(sys.argv[1]) / f"seed-{number}").write_bytes(one)
    atheris.Setup(sys.argv, target.run)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
