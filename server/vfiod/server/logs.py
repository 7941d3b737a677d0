"""Where the log goes, and in which form: lines, JSON lines, or the journal's own protocol.

``auto`` is the journal when standard error is connected to it (``JOURNAL_STREAM``, systemd.exec(5)), else lines. Who
logs does so as ever; who knows which device or event it is about says so::

    _log.warning("Device %s did not come back", name, extra=about(device=name))
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, Any, Final

from vfiod.protocol.settings import LOG_FORMATS

if TYPE_CHECKING:
    from vfiod.server.journal import Journal

__all__ = ["LOG_FORMATS", "about", "begin", "complain", "is_journal"]

PLAIN: Final = "%(name)s %(levelname).1s %(message)s"


def about(**fields: object) -> dict[str, Any]:
    """What a message is about, for ``extra=``: ``device``, ``event``, and what else has a name and a value."""
    return {"about": fields}


def is_journal(number: int = 2) -> bool:
    """Whether an fd is the journal's stream, as systemd says in ``JOURNAL_STREAM`` (``DEVICE:INODE``)."""
    stream = os.environ.get("JOURNAL_STREAM")
    if not stream:
        return False
    try:
        found = os.fstat(number)
    except OSError:
        return False
    return stream == f"{found.st_dev}:{found.st_ino}"


def complain(text: str) -> None:
    """Say on standard error why the program does not begin, or failed; in the journal, as an error."""
    prefix = "<3>" if is_journal() else ""
    print("\n".join(f"{prefix}vfiod: {line}" for line in text.split("\n")), file=sys.stderr)


def begin(level: int, form: str, *, vm: str) -> Journal | None:
    """Log from here on. Opens what it needs: the sandbox opens nothing later.

    Args:
        level: of :mod:`logging`.
        form: one of :data:`LOG_FORMATS`.
        vm: the name of the VM.

    Returns what structured entries can be given to directly; None: there are only lines.

    Raises OSError: ``journal`` was asked for, and there is none.

    """
    if form == "plain" or (form == "auto" and not is_journal()):
        logging.basicConfig(level=level, format=PLAIN, stream=sys.stderr)
        return None
    from vfiod.server.journal import Journal, JsonLines, PrefixedLines, StructuredHandler

    if form == "json":
        handler: logging.Handler = JsonLines(vm)
        journal = None
    else:
        try:
            journal = Journal(vm)
        except OSError:
            if form == "journal":
                raise
            journal = None
        handler = PrefixedLines() if journal is None else StructuredHandler(journal)
    logging.basicConfig(level=level, handlers=[handler])
    return journal
