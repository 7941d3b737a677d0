"""What the monitor does itself, at a terminal and in a pipe: fds by path."""

from __future__ import annotations

from typing import Final

from vfiod.client.call import open_fd
from vfiod.client.line import InvalidLine
from vfiod.protocol.fd import FileDescriptor

__all__ = ["named_path", "open_named"]

OWN_MEMBER: Final = "fdname="
"""``getfd fdname=x`` is the server's own form: the fd travels with it, which a line of text cannot say."""


def named_path(text: str) -> tuple[str, str] | None:
    """``pass NAME=PATH`` and ``getfd NAME=PATH`` as a name and a path; None: another line. Raises InvalidLine."""
    word, _, rest = text.partition(" ")
    rest = rest.strip()
    if word not in ("pass", "getfd") or rest.startswith("{"):
        return None
    name, _, path = rest.partition("=")
    if word == "getfd" and rest.startswith(OWN_MEMBER):
        raise InvalidLine(f"An fd comes from a path here: getfd {path or 'NAME'}=PATH")
    if not name or not path:
        raise InvalidLine(f"{word} takes NAME=PATH, such as {word} ram=/dev/shm/guest")
    return name, path


def open_named(text: str) -> tuple[str, FileDescriptor] | None:
    """The fd a line passes, opened, the caller's to close; None: the line is another. Raises InvalidLine."""
    named = named_path(text)
    return None if named is None else (named[0], open_fd(named[1]))
