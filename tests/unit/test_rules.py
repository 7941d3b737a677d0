"""Every rule of behaviour.md, sections 1 to 9, has tests that are there and say which section they are about."""

from __future__ import annotations

import ast
import functools
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TABLE = tomllib.loads((ROOT / "tests" / "rules.toml").read_text())
FILES: dict[str, str] = TABLE["files"]
RULES: list[dict[str, Any]] = TABLE["rule"]


@functools.cache
def docstrings(path: str) -> tuple[str, dict[str, str]]:
    """A module's docstring, and those of its tests by name. Read, not imported: some need a machine of their own."""
    tree = ast.parse((ROOT / path).read_text())
    tests = {
        node.name: ast.get_docstring(node) or ""
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    }
    return ast.get_docstring(tree) or "", tests


def names_section(text: str, section: int) -> bool:
    """Whether a text says "section 4", "sections 1 and 4", "sections 3 to 5"."""
    for match in re.finditer(r"[Ss]ections? ([\d, and to]+)", text):
        numbers = [int(number) for number in re.findall(r"\d+", match[1])]
        if section in numbers or (" to " in match[1] and numbers and numbers[0] <= section <= numbers[-1]):
            return True
    return False


@pytest.mark.parametrize("rule", RULES, ids=[f"{rule['section']}: {rule['says'][:60]}" for rule in RULES])
def test_a_rule_has_tests_that_are_there_and_name_it(rule: dict[str, Any]) -> None:
    assert rule.keys() == {"section", "says", "tests"}
    assert rule["tests"]
    for entry in rule["tests"]:
        file, _, name = entry.partition("::")
        module, tests = docstrings(FILES[file])
        assert name in tests, f"{FILES[file]} has no {name} any more: {rule['says']}"
        assert names_section(f"{module} {tests[name]}", rule["section"]), f"{FILES[file]}::{name}: which section?"


@pytest.mark.parametrize("what", TABLE["trouble"])
def test_every_trouble_has_tests_that_are_there(what: str) -> None:
    assert TABLE["trouble"][what]
    for entry in TABLE["trouble"][what]:
        file, _, name = entry.partition("::")
        assert name in docstrings(FILES[file])[1], f"{FILES[file]} has no {name} any more: {what}"


def test_the_table_is_tidy() -> None:
    assert {rule["section"] for rule in RULES} == set(range(1, 10))
    assert [rule["section"] for rule in RULES] == sorted(rule["section"] for rule in RULES)
    used = {entry.partition("::")[0] for rule in RULES for entry in rule["tests"]}
    assert used == FILES.keys(), "files that no rule names, or rules that name no file"
    says = [rule["says"] for rule in RULES]
    assert len(set(says)) == len(says)


@pytest.mark.parametrize(
    ("text", "sections"),
    [
        ("behaviour.md section 1, rule by rule", {1}),
        ("Section 4, MSI-X, with sections 2 and 3.", {2, 3, 4}),
        ("sections 3 to 5", {3, 4, 5}),
        ("behaviour.md, sections 4 and 5.", {4, 5}),
        ("of two sections", set()),
    ],
)
def test_what_counts_as_naming_a_section(text: str, sections: set[int]) -> None:
    assert {section for section in range(1, 10) if names_section(text, section)} == sections
