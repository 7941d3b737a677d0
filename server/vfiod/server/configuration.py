"""The TOML file of ``--config``: read, and held against the declared settings before anything else happens.

Everything that is wrong is said at once, each with its file and line, and with what would be right. Imported only when
there is a file: TOML costs a tenth of the start.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterator
from typing import Any, Final

from vfiod.protocol.errors import VfiodError
from vfiod.protocol.limits import MAX_CONFIG_SIZE
from vfiod.protocol.settings import SERVE, Setting

__all__ = ["KEYS", "ConfigurationError", "Lines", "read"]

KEYS: Final = {setting.name: setting for setting in SERVE if setting.in_file}
"""What a file may say."""

_TYPE_NAMES: Final = {str: "a string", int: "an integer", bool: "true or false"}


class ConfigurationError(VfiodError):
    """The file cannot be read, or something in it is wrong: one line for each."""


def read(path: str) -> tuple[dict[str, Any], Lines]:
    """Read a file. Returns the values by key, and where each stands. Raises ConfigurationError."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_CONFIG_SIZE + 1)
    except OSError as error:
        raise ConfigurationError(f"Cannot read the configuration '{path}': {error.strerror}") from error
    if len(data) > MAX_CONFIG_SIZE:
        raise ConfigurationError(f"The configuration '{path}' has more than {MAX_CONFIG_SIZE} bytes")
    try:
        text = data.decode()
        values = tomllib.loads(text)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigurationError(f"{path}:{line}: not TOML: byte 0x{data[error.start]:02x} is not UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(_syntax(path, text, str(error))) from error
    except ValueError as error:  # of Python's own: a number longer than it converts
        raise ConfigurationError(f"{path}: not TOML: a number has too many digits") from error
    except RecursionError as error:  # tomllib nests as deep as its input
        raise ConfigurationError(f"{path}: not TOML: nested too deeply") from error
    lines = Lines(path, text)
    problems = [problem for key, value in values.items() for problem in _problems(key, value, lines)]
    if problems:
        raise ConfigurationError("\n".join(problems))
    return values, lines


def _syntax(path: str, text: str, said: str) -> str:
    found = re.fullmatch(r"(.*) \(at line (\d+), column (\d+)\)", said, re.DOTALL)
    if found is not None:
        what, line, column = found.groups()
        return f"{path}:{line}:{column}: not TOML: {what}"
    return f"{path}:{text.count(chr(10)) + 1}: not TOML: {said}"


def _problems(key: str, value: Any, lines: Lines) -> Iterator[str]:
    setting = KEYS.get(key)
    if setting is None:
        yield f"{lines.of(key)}: {_unknown(key, value)}"
        return
    if isinstance(value, list) and setting.many:
        for one in value:
            wrong = _wrong_type(setting, one, "holds") or setting.wrong(one)
            if wrong:
                yield f"{lines.of(key, one)}: '{key}' {wrong}"
        return
    wrong = _wrong_type(setting, value, "is") or setting.wrong(value)
    if wrong:
        yield f"{lines.of(key)}: '{key}' {wrong}"


def _unknown(key: str, value: Any) -> str:
    words = f"unknown key '{key}'"
    near = difflib.get_close_matches(key.lower().replace("_", "-"), KEYS, n=1)
    if near:
        return f"{words}: did you mean '{near[0]}'?"
    if isinstance(value, dict):
        return f"{words}: there are no sections, every key stands at the top"
    return f"{words}: known are {', '.join(KEYS)}"


def _wrong_type(setting: Setting, value: Any, verb: str) -> str:
    if type(value) in setting.types:  # a bool is an int to isinstance, and not here
        return ""
    wanted = [_TYPE_NAMES[one] for one in setting.types] + (["a list"] if setting.many and verb == "is" else [])
    return f"{verb} {_shown(value)}, expected {' or '.join(wanted)}"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "a list"
    return f"'{value}'" if isinstance(value, str) else str(value)


class Lines:
    """Where things stand in a file. TOML's reader does not say, so they are looked for."""

    def __init__(self, path: str, text: str) -> None:
        self._path = path
        self._lines = text.split("\n")

    def of(self, key: str, item: Any = None) -> str:
        """``FILE:LINE`` of a key, or of an item of its list; the file alone when it cannot be told."""
        number = self._line(key)
        if number is None:
            return self._path
        if item is not None:
            written = re.escape(item if isinstance(item, str) else _shown(item))
            for further, line in enumerate(self._lines[number - 1 :], number):
                if re.search(rf"(?<![\w.]){written}(?![\w.])", line):
                    number = further
                    break
        return f"{self._path}:{number}"

    def _line(self, key: str) -> int | None:
        name = re.escape(key)
        begins = re.compile(rf"""\s*(\[+\s*)?("{name}"|'{name}'|{name})\s*[.=\]]""")
        for number, line in enumerate(self._lines, 1):
            if begins.match(line) and self._is_outside(number):
                return number
        return None

    def _is_outside(self, number: int) -> bool:
        """Whether a line begins outside of every string and list: what stands before it is whole."""
        try:
            tomllib.loads("\n".join(self._lines[: number - 1]))
        except tomllib.TOMLDecodeError:
            return False
        return True
