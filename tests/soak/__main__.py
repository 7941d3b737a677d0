"""``python -m tests.soak``: soak a server, print a table, draw a picture; fails when something is not flat."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

REPO = Path(__file__).parents[2]
for part in ("protocol", "server", "client"):
    sys.path.append(str(REPO / part))

from tests.soak.plot import picture  # noqa: E402  # vfiod is found now, installed or not
from tests.soak.soak import FLAT, Sample, run, slope, steep  # noqa: E402


def main() -> int:
    """Returns 1 when something rises."""
    parser = argparse.ArgumentParser(prog="tests.soak", description=__doc__)
    parser.add_argument("--operations", type=int, default=100_000)
    parser.add_argument("--samples", type=int, default=100, help="looks at the server, evenly (100)")
    parser.add_argument("--seed", type=int, default=1, help="of the order of operations (1)")
    parser.add_argument("--faster", type=float, default=60.0, help="seconds of the server's clock in one (60)")
    parser.add_argument("--svg", type=Path, help="draw it here")
    options = parser.parse_args()
    print(f"Python {sys.version.split()[0]}, Linux {os.uname().release}, seed {options.seed}\n")
    print(
        f"{'operations':>10} {'hours':>6} {'PSS KiB':>8} {'blocks':>8} {'entries':>8} {'fds':>4} {'threads':>7}", end=""
    )
    print(f" {'hotplug':>9} {'interrupt':>9} {'mapping':>9}  median, ms")
    samples = []
    for sample in run(options.operations, seed=options.seed, samples=options.samples, faster=options.faster):
        samples.append(sample)
        print(_row(sample), flush=True)
    if options.svg is not None:
        options.svg.write_text(picture(samples))
    warm = options.operations // 10
    print("\nrise with each operation, after the first tenth:")
    counted = [one for one in samples if one.operations >= warm]
    for name, allowed in FLAT.items():
        rise = slope([(one.operations, getattr(one.held, name)) for one in counted])
        print(f"{name:>10} {rise:+.5f}  (allowed: {allowed})")
    faults = steep(samples, warm)
    print("\n".join(faults))
    return 1 if faults else 0


def _row(sample: Sample) -> str:
    held = sample.held
    times = "".join(f" {sample.median_ms.get(kind, 0):9.2f}" for kind in ("hotplug", "interrupt", "mapping"))
    return (
        f"{sample.operations:>10} {sample.hours:>6.2f} {held.pss_kib:>8} {held.blocks:>8} {held.entries:>8} "
        f"{held.fds:>4} {held.threads:>7}{times}"
    )


if __name__ == "__main__":
    sys.exit(main())
