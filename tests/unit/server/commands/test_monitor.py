"""Family "monitor": what is said without asking the package's metadata must still be true."""

from __future__ import annotations

import tomllib
from pathlib import Path

from vfiod.server.commands.monitor import VERSION

ROOT = Path(__file__).parents[4]


def test_the_version_is_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    numbers = VERSION.qemu
    assert f"{numbers.major}.{numbers.minor}.{numbers.micro}" == project["version"]
    assert VERSION.package == project["name"]
