"""A tried example for every command: conversations with a server, which the tests have, word for word.

What is sent begins with ``-> ``, what comes with ``<- ``, and a line ``// sent with it: ...`` says which fds go along.
``"..."`` stands for what is another each time. Imported by the reference and the tests only, never by a server.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Final

import msgspec

from vfiod.protocol.examples import channel, kernel, machine, pci

__all__ = ["Example", "STORIES", "LAB_STORIES", "of_command", "of_event"]

STORIES: Final = {"machine": machine.STORY, "pci": pci.STORY, "channel": channel.STORY}
"""What can be run anywhere, in this order, on one server: one session each."""

LAB_STORIES: Final = {"kernel": kernel.STORY}
"""What needs devices of the kernel."""


class Example(msgspec.Struct, frozen=True):
    """One command with its answer, and the events that came of it.

    Attributes:
        command: which one.
        text: as a person reads it.
        events: names of the events in it.
        refused: the answer is an error.
        lab: run in the kernel lab only.

    """

    command: str
    text: str
    events: tuple[str, ...]
    refused: bool
    lab: bool


def _examples(story: str, lab: bool) -> Iterator[Example]:
    for part in re.split(r"^(?=// sent with it|->)", story, flags=re.MULTILINE):
        if part.startswith("//"):
            before = part
            continue
        if not part.startswith("->"):
            before = ""
            continue
        sent, *came = re.split(r"^<-", part, flags=re.MULTILINE)
        values = [json.loads(one) for one in came]
        yield Example(
            command=json.loads(sent[2:])["execute"],
            text=(before + part).strip("\n"),
            events=tuple(value["event"] for value in values if "event" in value),
            refused="error" in values[0],
            lab=lab,
        )
        before = ""


_ALL: Final = [
    example
    for stories, lab in ((STORIES, False), (LAB_STORIES, True))
    for story in stories.values()
    for example in _examples(story, lab)
]


def of_command(name: str) -> list[Example]:
    """The command's examples to show: the first that runs anywhere, and the first done with the kernel's devices."""
    found = [example for example in _ALL if example.command == name]
    anywhere = sorted((one for one in found if not one.lab), key=lambda one: one.refused)
    return anywhere[:1] + [one for one in found if one.lab and one.command not in _EVERYWHERE][:1]


def of_event(name: str) -> str | None:
    """The event as it came, for the first example that has it."""
    for example in _ALL:
        if name in example.events:
            parts = re.split(r"^(?=<-)", example.text, flags=re.MULTILINE)
            return next(part for part in parts if part.startswith("<-") and f'"{name}"' in part).strip("\n")
    return None


_EVERYWHERE: Final = ("getfd", "device_del")
"""Shown once: they are the same with devices of the kernel."""
