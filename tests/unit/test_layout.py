"""The layout of style.md section 2: three roots, one namespace, bounds that are proved."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

import vfiod

ROOT = Path(__file__).parents[2]


def test_the_namespace_has_no_file_of_its_own() -> None:
    # A stray vfiod/__init__.py in one root would hide the other two.
    assert getattr(vfiod, "__file__", None) is None


def test_each_root_holds_one_part_and_is_typed() -> None:
    for root in ("protocol", "server", "client"):
        assert [path.name for path in (ROOT / root / "vfiod").iterdir() if path.name != "__pycache__"] == [root]
        assert (ROOT / root / "vfiod" / root / "py.typed").is_file()


def test_the_lowest_bounds_are_the_ones_make_minimum_installs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [Requirement(text) for text in project["project"]["dependencies"] + project["dependency-groups"]["test"]]
    pinned = {r.name: r.specifier for r in map(Requirement, (ROOT / "tests" / "minimum.txt").read_text().split())}
    assert {requirement.name for requirement in wanted} == set(pinned)
    for requirement in wanted:
        lowest = next(clause.version for clause in requirement.specifier if clause.operator == ">=")
        exact = next(clause.version for clause in pinned[requirement.name])
        assert exact in (lowest, f"{lowest}.0", f"{lowest}.0.0"), requirement.name
        assert any(clause.operator == "<" for clause in requirement.specifier), f"{requirement.name} has no upper bound"


def test_modules_stay_small_enough_to_read() -> None:
    # style.md section 1: 100 to 400 lines, 700 is the alarm.
    for root in ("protocol", "server", "client"):
        for path in (ROOT / root).rglob("*.py"):
            text = path.read_text()
            if "do not edit" in text.partition("\n")[0]:
                continue  # generated: nobody reads it from top to bottom
            lines = text.count("\n")
            assert lines <= 700, f"{path.relative_to(ROOT)} has {lines} lines: split it"
