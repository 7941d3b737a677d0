"""The same targets under atheris (libFuzzer), when it is installed: ``python -m tests.fuzz.vfio_user_atheris [DIR]``.

``DIR`` keeps what is found from run to run; libFuzzer's own options (``-max_total_time=600``) follow it.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from pathlib import Path


def main() -> None:
    """Run until something is found, or libFuzzer's options say stop."""
    atheris = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["vfiod.protocol"]):
        from tests.fuzz.vfio_user_targets import corpus, target

    arguments = sys.argv[1:]
    place = Path(arguments.pop(0)) if arguments and not arguments[0].startswith("-") else Path(tempfile.mkdtemp())
    place.mkdir(exist_ok=True)
    for number, one in enumerate(corpus()):
        (place / f"seed-{number}").write_bytes(one)
    atheris.Setup([sys.argv[0], str(place), *arguments], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
