"""A configuration file, and a command line: what a person or a generator got wrong.

The input is the file; for the command line its lines are the words.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import tempfile

from tests.fuzz.target import Target, lines

from vfiod.server.options import OptionError, Options, parse

__all__ = ["TARGETS"]

_places: list[str] = []


def _place() -> str:
    """One file for all inputs; the name stands in every message."""
    if not _places:
        number, path = tempfile.mkstemp(suffix=".toml")
        os.close(number)
        atexit.register(os.unlink, path)
        _places.append(path)
    return _places[0]


def _file(data: bytes) -> None:
    with open(_place(), "wb") as file:
        file.write(data)
    _parsed(["--config", _place()])


def _line(data: bytes) -> None:
    words = data.decode("utf-8", "surrogateescape").split("\n")
    if "--config" not in "".join(words):  # a file that is anywhere is not ours to read
        _parsed(words)


def _parsed(words: list[str]) -> None:
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            options = parse(words)
    except OptionError as error:
        assert str(error)
    except SystemExit as error:
        assert error.code in (0, 2)
    else:
        assert isinstance(options, Options)
        assert options.name
        assert options.sockets or options.bus


TARGETS = (
    Target(
        "configuration-file",
        _file,
        lambda: lines("configuration-file"),
        ("vfiod.server.options", "vfiod.server.configuration", "vfiod.protocol.settings"),
        "options that are checked, or an OptionError",
        80,
    ),
    Target(
        "command-line",
        _line,
        lambda: lines("command-line"),
        ("vfiod.server.options", "vfiod.server.configuration", "vfiod.protocol.settings"),
        "options that are checked, or an OptionError, or argparse's own refusal",
        50,
    ),
)
