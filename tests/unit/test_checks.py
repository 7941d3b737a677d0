"""Types, style and layers are tests like the others: `make check` runs this file alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON_BIN = Path(sys.executable).parent


@pytest.mark.parametrize(
    "command",
    [
        ["mypy"],
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["lint-imports", "--no-cache"],
    ],
    ids=["mypy", "ruff", "format", "import-linter"],
)
def test_clean(command: list[str]) -> None:
    program = PYTHON_BIN / command[0]
    assert program.exists(), f"{command[0]} is not installed: make check installs it"
    done = subprocess.run([str(program), *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
