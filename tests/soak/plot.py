"""The picture of a soak, as SVG: one small diagram below another, all over the same operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tests.soak.soak import Sample

__all__ = ["picture"]

WIDTH, HEIGHT, LEFT, TOP, GAP = 820, 110, 70, 34, 44
COLOURS: Final = {"hotplug": "#1f5fa8", "interrupt": "#b5442c", "mapping": "#2f7d4f"}
SHOWN: Final = (
    ("pss_kib", "memory (PSS), KiB"),
    ("blocks", "blocks of memory that Python holds"),
    ("entries", "entries of all dicts, lists and sets"),
    ("fds", "open files"),
    ("threads", "threads"),
)

Line = tuple[str, Sequence[tuple[float, float]]]
"""A colour, and points."""


def picture(samples: Sequence[Sample]) -> str:
    """An SVG document."""
    last = samples[-1]
    diagrams: list[tuple[str, list[Line]]] = [
        (f"{name} of an operation, median, ms", [(colour, [(s.operations, s.median_ms[name]) for s in samples[1:]])])
        for name, colour in COLOURS.items()
    ]
    for field, title in SHOWN:
        diagrams.append((title, [("#444", [(s.operations, getattr(s.held, field)) for s in samples])]))
    height = TOP + len(diagrams) * (HEIGHT + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 20}" height="{height}" '
        'font-family="sans-serif" font-size="12" fill="#222">',
        '<rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="{LEFT}" y="20" font-size="14">{last.operations:,} operations, {last.hours:.1f} hours of the '
        "server's clock</text>",
    ]
    for number, (title, lines) in enumerate(diagrams):
        parts += _diagram(title, lines, TOP + 16 + number * (HEIGHT + GAP), last.operations)
    return "\n".join([*parts, "</svg>", ""])


def _diagram(title: str, lines: list[Line], top: float, most: int) -> list[str]:
    highest = max(y for _, points in lines for _, y in points) * 1.15 or 1.0
    bottom = top + HEIGHT
    parts = [
        f'<text x="{LEFT}" y="{top - 5}">{title}</text>',
        f'<rect x="{LEFT}" y="{top}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#bbb"/>',
        f'<text x="{LEFT - 6}" y="{top + 10}" text-anchor="end">{highest:.4g}</text>',
        f'<text x="{LEFT - 6}" y="{bottom}" text-anchor="end">0</text>',
        f'<text x="{LEFT}" y="{bottom + 14}">0</text>',
        f'<text x="{LEFT + WIDTH}" y="{bottom + 14}" text-anchor="end">{most:,}</text>',
    ]
    for colour, points in lines:
        places = " ".join(f"{LEFT + WIDTH * x / most:.1f},{bottom - HEIGHT * y / highest:.1f}" for x, y in points)
        parts.append(f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
    return parts
