"""The transition tables of relayed platform interrupts, as the page ``docs/platform-interrupts.md``.

``make docs`` writes the page with ``python -m vfiod.server.interrupts.tables``; a test holds it to the tables.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Final

from vfiod.server.interrupts.intx import FAST_PATH, Action
from vfiod.server.interrupts.platform import RELAYED

__all__ = ["page"]

_HEAD: Final = """\
# The relayed interrupts of a platform device

Written by `make docs` from the tables of
[`interrupts/platform.py`](../server/vfiod/server/interrupts/platform.py); what a table does not list cannot happen.

Each interrupt of a device is in one of three states, and at most one of them is active: the access that completes an
interrupt cannot say which it means. The others wait in a queue, in the order they came. When the active one is
completed or stopped, the first of the queue that the user does not mask has its turn.

## One interrupt

"""

_MIDDLE: Final = """
"Unmask in the kernel" is left out for an edge, and for an interrupt that the user masked. An edge that arrives while it
is active is coalesced: the access that completes it comes after the edge. When `irq-eoi` completes it instead, it is
delivered once more. An edge *passes* when accesses complete nothing, because another process maps a region.

## The fast path

Mapped access to regions goes off when an interrupt becomes active that an access will complete. "BAR" is any region
here. With `mmap-timeout-ms` 0 there is no timer: it stays off until nothing is relayed any more.

"""


def page() -> str:
    """The page, in Markdown."""
    return _HEAD + _table(RELAYED) + _MIDDLE + _table(FAST_PATH)


def _table(transitions: Mapping[tuple[Any, Any], tuple[Any, tuple[Action, ...]]]) -> str:
    lines = ["| state | what happens | next state | what is done |", "|---|---|---|---|"]
    for (state, event), (following, actions) in transitions.items():
        done = "; ".join(action.value for action in actions) or "nothing"
        lines.append(f"| {state.value} | {event.value} | {following.value} | {done} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
