"""Messages of a platform device (extended IRQs, experimental), as a table: asked for, read back, released whole.

The kernel never took this interface ("vfio/platform: add support for msi", RFC v3), so nobody relies on a kernel here:
a device may say that it has more than it grants, grant without telling the messages, or tell the same one twice. What
cannot be used is released again; a block that was granted is the whole block.

:class:`MessageBlock` takes what happened and says what is to be done; I/O is elsewhere. A missing key is the error.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

from vfiod.protocol.vfio.capabilities import MsiMessage
from vfiod.protocol.vfio.structs import IrqInfo

__all__ = ["TRANSITIONS", "Act", "Answer", "Block", "BlockRefused", "MessageBlock"]


class Block(enum.StrEnum):
    """Where the block is."""

    FREE = "free"
    ASKING = "asking"
    READING = "reading"
    GRANTED = "granted"
    REBINDING = "rebinding"
    RELEASING = "releasing"


class Answer(enum.StrEnum):
    """What happened."""

    ASK = "ask"
    """Somebody wants messages, with an eventfd for each."""
    REBIND = "rebind"
    """Somebody wants other eventfds for messages that were granted."""
    RELEASE = "release"
    """Somebody wants none any more."""
    DONE = "done"
    """What was to be done was done."""
    FEWER = "fewer"
    """``SET_IRQS``: so many cannot be had; nothing was changed."""
    FAILED = "failed"
    """It failed."""
    UNUSABLE = "unusable"
    """The messages that were read cannot be used."""


class Act(enum.StrEnum):
    """What is to be done."""

    NOTHING = "nothing"
    SET = "set the eventfds"
    READ = "read the messages"
    RELEASE = "release the block"


TRANSITIONS: Final[Mapping[tuple[Block, Answer], tuple[Block, Act]]] = MappingProxyType(
    {
        (Block.FREE, Answer.ASK): (Block.ASKING, Act.SET),
        (Block.FREE, Answer.RELEASE): (Block.FREE, Act.NOTHING),
        (Block.ASKING, Answer.DONE): (Block.READING, Act.READ),
        (Block.ASKING, Answer.FEWER): (Block.ASKING, Act.SET),
        (Block.ASKING, Answer.FAILED): (Block.FREE, Act.NOTHING),
        (Block.READING, Answer.DONE): (Block.GRANTED, Act.NOTHING),
        (Block.READING, Answer.FAILED): (Block.RELEASING, Act.RELEASE),
        (Block.READING, Answer.UNUSABLE): (Block.RELEASING, Act.RELEASE),
        (Block.GRANTED, Answer.REBIND): (Block.REBINDING, Act.SET),
        (Block.GRANTED, Answer.RELEASE): (Block.RELEASING, Act.RELEASE),
        (Block.REBINDING, Answer.DONE): (Block.GRANTED, Act.NOTHING),
        # Some have their new eventfd, some the old one, some none: the block is undone.
        (Block.REBINDING, Answer.FEWER): (Block.RELEASING, Act.RELEASE),
        (Block.REBINDING, Answer.FAILED): (Block.RELEASING, Act.RELEASE),
        # Released in any case: there is nothing else that could be done.
        (Block.RELEASING, Answer.DONE): (Block.FREE, Act.NOTHING),
        (Block.RELEASING, Answer.FAILED): (Block.FREE, Act.NOTHING),
    }
)


class BlockRefused(Exception):
    """What was asked for cannot be in this state; the text says what would be right."""


class MessageBlock:
    """The messages of one index.

    Args:
        index: the IRQ index, found by its type.
        most: how many it says it has; it may have fewer.

    Attributes:
        state: where the block is.
        wanted: how many are being asked for.
        messages: what was granted.

    """

    __slots__ = ("index", "messages", "most", "state", "wanted")

    def __init__(self, index: int, most: int) -> None:
        self.index = index
        self.most = most
        self.state = Block.FREE
        self.wanted = 0
        self.messages: tuple[MsiMessage, ...] = ()

    def ask(self, count: int) -> Act:
        """Take so many messages, or give those that were granted other eventfds. Raises BlockRefused."""
        if not 1 <= count <= self.most:
            raise BlockRefused(f"index {self.index} has {self.most} messages, not {count}")
        if self.state is Block.GRANTED:
            if count > len(self.messages):
                raise BlockRefused(
                    f"{len(self.messages)} messages of index {self.index} were granted, and a block does not grow: "
                    "irq-stop it, and ask again"
                )
            act = self._take(Answer.REBIND)
        else:
            act = self._take(Answer.ASK)
        self.wanted = count
        return act

    def granted(self, messages: tuple[MsiMessage, ...]) -> None:
        """Another process was granted these: they stay so."""
        self.state, self.messages, self.wanted = Block.GRANTED, messages, len(messages)

    def release(self) -> Act:
        """Give all of them back."""
        return self._take(Answer.RELEASE)

    def done(self) -> Act:
        """The eventfds are set, or the block is released."""
        act = self._take(Answer.DONE)
        if self.state is Block.FREE:
            self.messages = ()
        return act

    def failed(self) -> Act:
        """What was to be done failed."""
        act = self._take(Answer.FAILED)
        if self.state is Block.FREE:
            self.messages = ()
        return act

    def fewer(self, granted: int | None) -> Act:
        """So many cannot be had. With a smaller number it is asked for that; else it failed."""
        if self.state is Block.ASKING and not (granted is not None and 1 <= granted < self.wanted):
            return self._take(Answer.FAILED)
        act = self._take(Answer.FEWER)
        if self.state is Block.ASKING and granted is not None:
            self.wanted = granted
        return act

    def read(self, info: IrqInfo) -> tuple[Act, str]:
        """What the index says of itself now. Gives what is to be done, and why when the messages are of no use."""
        messages = info.messages[: self.wanted]
        why = _unusable(info.index, messages)
        if why:
            return self._take(Answer.UNUSABLE), why
        act = self._take(Answer.DONE)
        # Fewer than eventfds: those without a message can never fire, so they were not granted.
        self.messages = messages
        self.wanted = len(messages)
        return act, ""

    def _take(self, answer: Answer) -> Act:
        step = TRANSITIONS.get((self.state, answer))
        if step is None:
            raise BlockRefused(f"index {self.index} is {self.state}: it cannot take '{answer}' now")
        self.state, act = step
        return act


def _unusable(index: int, messages: Sequence[MsiMessage]) -> str:
    if not messages:
        return f"index {index} took the eventfds and tells no messages"
    if len(set(messages)) != len(messages):
        return f"index {index} tells the same message for two vectors: nobody could say whose it is"
    return ""
