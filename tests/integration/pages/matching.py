"""What a page shows, against what came: ``...`` stands for anything."""

from __future__ import annotations

import fnmatch
import re
from typing import Any


def like(text: str, pattern: str) -> bool:
    """Text, in which ``...`` of the pattern is any text."""
    quoted = re.sub(r"([\[\]?*])", lambda found: f"[{found[1]}]", pattern)
    return fnmatch.fnmatchcase(text, quoted.replace("...", "*"))


def differences(shown: Any, came: Any, where: str = "it") -> list[str]:
    """Where a value is not what an example shows; none when it is.

    In an example, ``"..."`` is any value, and other strings may have ``...`` in them; a member ``"...": "..."`` of an
    object stands for members that are not shown, and ``"..."`` as the last element of a list for elements that are not.
    """
    if shown == "...":
        return []
    if isinstance(shown, dict) and isinstance(came, dict):
        more = "..." in shown
        wanted = {name: value for name, value in shown.items() if name != "..."}
        found = [f"{where} has no '{name}'" for name in wanted.keys() - came.keys()]
        found += [f"{where}.{name} is not shown" for name in came.keys() - wanted.keys() if not more]
        for name in wanted.keys() & came.keys():
            found += differences(wanted[name], came[name], f"{where}.{name}")
        return found
    if isinstance(shown, list) and isinstance(came, list):
        wanted_items = shown[:-1] if shown and shown[-1] == "..." else shown
        if len(came) < len(wanted_items) or (wanted_items is shown and len(came) != len(shown)):
            return [f"{where} has {len(came)} elements, shown are {len(wanted_items)}"]
        return [
            fault
            for number, (one, other) in enumerate(zip(wanted_items, came, strict=False))
            for fault in differences(one, other, f"{where}[{number}]")
        ]
    if isinstance(shown, str) and isinstance(came, str):
        return [] if like(came, shown) else [f"{where} is {came!r}, shown is {shown!r}"]
    return [] if type(shown) is type(came) and shown == came else [f"{where} is {came!r}, shown is {shown!r}"]
