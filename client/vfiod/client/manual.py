"""The manual pages, written from the parsers, the settings and the catalogue: ``python -m vfiod.client.manual DIR``.

roff with the macros of man(7), and no others. The commands' texts are those of the catalogue.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from vfiod.client.program import SUBCOMMANDS
from vfiod.client.programs import Option, Program, options_of, programs
from vfiod.protocol.catalogue.declare import COMMANDS, EVENTS, Family
from vfiod.protocol.introspection import documented_fields
from vfiod.protocol.reference import types_in_words
from vfiod.protocol.settings import SERVE, Setting

__all__ = ["main", "pages"]

_ABOUT: Final = (
    "A device server for virtual machines: it holds the VFIO devices of one VM, beside its hypervisor, and serves them "
    "by commands on Unix sockets (QMP, JSON-RPC), on a bus (ZeroMQ), and to hypervisors by vfio-user."
)
_FILES: Final = {
    "vfiod": [("/etc/vfiod/VM.toml", "options of a VM's server, by convention; see vfiod.toml(5)"),
              ("/run/vfiod/", "sockets, by convention"),
              ("/run/vfiod/host/", "what vfiod host noted before each step of a bind or an unbind")],
}  # fmt: skip
_SIGNALS: Final = [
    ("SIGTERM, SIGINT", "close every device in order, and end with status 0; 1 when something could not be closed."),
    ("SIGHUP", "read the file of --config again: log-level and trace are taken, the rest waits for a restart."),
]
_ENVIRONMENT: Final = [
    (
        "NOTIFY_SOCKET, WATCHDOG_USEC, WATCHDOG_PID",
        "of systemd: readiness, status, and the watchdog of the event loop.",
    ),
    ("JOURNAL_STREAM", "of systemd: whether standard error is the journal (--log-format auto)."),
]
_STATUS: Final = (
    "0: it was asked to end, and closed every device. 1: it could not begin, or something could not be closed. "
    "2: wrong options or configuration."
)


def main(arguments: list[str]) -> int:
    """Write every page into a directory; with no directory, print their names."""
    for name, text in pages().items():
        if arguments:
            (Path(arguments[0]) / name).write_text(text)
        else:
            print(name)
    return 0


def pages() -> dict[str, str]:
    """Every page, by its file's name."""
    found = {"vfiod.1": _overview()}
    everything = list(programs())
    for name in SUBCOMMANDS:
        found[f"vfiod-{name}.1"] = _program([one for one in everything if one.words[0] == name])
    found["vfiod-commands.7"] = _commands()
    found["vfiod.toml.5"] = _file()
    return {name: "\n".join(lines) + "\n" for name, lines in found.items()}


# --- roff ------------------------------------------------------------------------------------------


def _escaped(text: str) -> str:
    """A text as it shall be read: no request, no escape; minus signs stay minus signs."""
    plain = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("^", "\\(ha")
    plain = plain.replace("~", "\\(ti").replace("`", "\\(ga")
    plain = "".join(one if ord(one) < 128 else f"\\[u{ord(one):04X}]" for one in plain)
    return re.sub(r"^\.", r"\\&.", plain, flags=re.MULTILINE)


def _prose(text: str) -> Iterator[str]:
    """Paragraphs and lists of a docstring; what stands in double or single backquotes is bold."""
    for number, paragraph in enumerate(re.split(r"\n\s*\n", inspect.cleandoc(text))):
        lines = paragraph.split("\n")
        if number:
            yield ".PP"
        if len(lines) > 1 and all(line.startswith(" ") for line in lines[1:]) and not lines[0].startswith("-"):
            lines = [lines[0], *(line.strip() for line in lines[1:])]
        for line in lines:
            if re.match(r"[-*] ", line):
                yield ".IP \\(bu 2"
                line = line[2:]
            pieces = re.split(r"``(.+?)``|`([^`]+)`", line.strip())
            yield "".join(
                f"\\fB{_escaped(piece)}\\fR" if index % 3 else _escaped(piece)
                for index, piece in enumerate(pieces)
                if piece is not None
            )


def _head(title: str, section: int, name: str, about: str) -> Iterator[str]:
    yield '.\\" Written by "make docs": do not edit.'
    yield f'.TH {_escaped(title)} {section} "" vfiod "vfiod manual"'
    yield ".SH NAME"
    yield f"{_escaped(name)} \\- {_escaped(about)}"


def _tagged(tag: str, text: str) -> Iterator[str]:
    yield ".TP"
    yield tag
    yield from _prose(text)


def _see(own: str) -> Iterator[str]:
    yield ".SH SEE ALSO"
    others = ["vfiod(1)", *(f"vfiod-{name}(1)" for name in SUBCOMMANDS), "vfiod.toml(5)", "vfiod-commands(7)"]
    yield ",\n".join(
        f"\\fB{_escaped(name)}\\fR({section}"
        for name, _, section in (one.partition("(") for one in others if one != own)
    )


# --- programs --------------------------------------------------------------------------------------


def _overview() -> Iterator[str]:
    yield from _head("VFIOD", 1, "vfiod", "device server for virtual machines")
    yield ".SH SYNOPSIS"
    yield ".B vfiod\n.I COMMAND\n.RI [ ARGUMENT ...]"
    yield ".SH DESCRIPTION"
    yield from _prose(_ABOUT)
    yield ".SH COMMANDS"
    for name, (_, about) in SUBCOMMANDS.items():
        yield from _tagged(f"\\fBvfiod\\-{name}\\fR(1)", about)
    yield ".SH EXIT STATUS"
    yield from _prose(
        "0: done. 1: it failed, and standard error says why. 2: the command line makes no sense. 130: Ctrl-C."
    )
    yield ".SH FILES"
    for path, about in _FILES["vfiod"]:
        yield from _tagged(f"\\fI{_escaped(path)}\\fR", about)
    yield from _see("vfiod(1)")


def _program(family: list[Program]) -> Iterator[str]:
    first = family[0]
    name = first.words[0]
    yield from _head(f"VFIOD-{name.upper()}", 1, f"vfiod-{name}", first.about)
    yield ".SH SYNOPSIS"
    leaves = [one for one in family if one.last]
    for number, one in enumerate(leaves):
        if number:
            yield ".br"
        yield from _synopsis(one)
    yield ".SH DESCRIPTION"
    yield from _prose(first.parser.description or first.about)
    declared = {one.name: one for one in SERVE} if name == "serve" else {}
    for one in leaves:
        options, arguments = options_of(one)
        if len(leaves) > 1 or one is not first:
            yield f".SH VFIOD {_escaped(' '.join(one.words).upper())}"
            yield from _prose(f"{one.about[:1].upper()}{one.about[1:].rstrip('.')}.")
        else:
            yield ".SH OPTIONS"
        for option in [*arguments, *options]:
            yield from _option(option, declared)
    if first.parser.epilog:
        yield ".SH NOTES"
        yield ".nf" if first.parser.formatter_class is argparse.RawDescriptionHelpFormatter else '.\\"'
        yield _escaped(first.parser.epilog.strip("\n"))
        yield ".fi" if first.parser.formatter_class is argparse.RawDescriptionHelpFormatter else '.\\"'
    if name == "serve":
        yield ".SH SIGNALS"
        for tag, about in _SIGNALS:
            yield from _tagged(f"\\fB{tag}\\fR", about)
        yield ".SH ENVIRONMENT"
        for tag, about in _ENVIRONMENT:
            yield from _tagged(f"\\fB{_escaped(tag)}\\fR", about)
        yield ".SH EXIT STATUS"
        yield from _prose(_STATUS)
    yield from _see(f"vfiod-{name}(1)")


def _synopsis(program: Program) -> Iterator[str]:
    options, arguments = options_of(program)
    words = [f"\\fBvfiod {_escaped(' '.join(program.words))}\\fR"]
    needed = [one for one in options if one.required]
    words += [f"\\fB{_escaped(one.option_strings[-1])}\\fR \\fI{_escaped(_metavar(one))}\\fR" for one in needed]
    if len(options) > len(needed):
        words.append("[\\fIOPTION\\fR]...")
    for one in arguments:
        word = f"\\fI{_escaped(_metavar(one))}\\fR"
        words.append({"*": f"[{word}]...", "+": f"{word}..."}.get(str(one.nargs), word))
    if program.words == ("run",):
        words.append("\\fB\\-\\-\\fR \\fIHYPERVISOR\\fR [\\fIARGUMENT\\fR]...")
    yield " ".join(words)


def _metavar(option: Option) -> str:
    if option.metavar is None and option.choices is not None:
        return "|".join(str(one) for one in option.choices)
    if isinstance(option.metavar, str):
        return option.metavar
    return option.dest.upper() if option.option_strings else option.dest


def _option(option: Option, declared: dict[str, Setting]) -> Iterator[str]:
    value = f" \\fI{_escaped(_metavar(option))}\\fR"
    tag = ", ".join(f"\\fB{_escaped(name)}\\fR" for name in option.option_strings)
    about = (option.help or "").replace("%(default)s", str(option.default)).replace("%%", "%")
    more = declared.get(option.option_strings[-1][2:]) if option.option_strings else None
    if more is not None and more.more:
        about = f"{about}. {more.more}"
    yield from _tagged((tag + (value if option.nargs != 0 else "")) if tag else value.strip(), f"{about.rstrip('.')}.")


# --- the file and the commands ---------------------------------------------------------------------


def _file() -> Iterator[str]:
    yield from _head("VFIOD.TOML", 5, "vfiod.toml", "options of vfiod-serve in a file")
    yield ".SH DESCRIPTION"
    yield from _prose(
        "`vfiod serve --config FILE` takes its options from a TOML file. A key is an option without its dashes; an "
        "option on the command line wins over the key. All keys stand at the top, there are no sections. An unknown "
        "key, a wrong type or a value out of range is an error that names the file, the line, and what would be right; "
        "nothing has begun then.\n\nThe schema of the file is docs/vfiod.schema.json (JSON Schema), for editors."
    )
    yield ".SH KEYS"
    for one in SERVE:
        if one.in_file:
            yield from _tagged(
                f"\\fB{_escaped(one.name)}\\fR = \\fI{_escaped(one.example or one.metavar)}\\fR", _key(one)
            )
    yield ".SH EXAMPLE"
    yield ".nf"
    yield _escaped('name = "vm1"\nqmp = ["unix:/run/vfiod/vm1/qmp", "unix:/run/vfiod/vm1/look,role=observer"]')
    yield _escaped('metrics = "unix:/run/vfiod/vm1/metrics"\nlog-level = "info"\nallow-uid = [107]')
    yield ".fi"
    yield from _see("vfiod.toml(5)")


def _key(setting: Setting) -> str:
    types = {str: "a string", int: "an integer", bool: "true or false"}
    kind = " or ".join(types[one] for one in setting.types) + (", or a list of them" if setting.many else "")
    standard = f" Default: {setting.standard}." if setting.standard else ""
    more = f" {setting.more}" if setting.more else ""
    about = setting.help.replace("; may be repeated", "").rstrip(".")
    return f"{about[:1].upper()}{about[1:]}. It is {kind}.{standard}{more}"


def _commands() -> Iterator[str]:
    yield from _head("VFIOD-COMMANDS", 7, "vfiod-commands", "commands and events of a vfiod server")
    yield ".SH DESCRIPTION"
    yield from _prose(
        'Over QMP a command is {"execute": NAME, "arguments": {...}}, over JSON-RPC 2.0 {"jsonrpc": "2.0", "method": '
        'NAME, "params": {...}, "id": ID}; `vfiod call PATH NAME key=value...` sends one. Names, arguments and '
        "results are the same. A command marked oob may be run out of band, one marked slow may wait for the kernel or "
        "a peer, one marked reads changes nothing."
    )
    for family in Family:
        commands = [one for one in COMMANDS.values() if one.family is family]
        events = [one for one in EVENTS.values() if one.family is family]
        if commands or events:
            yield f'.SH "{_escaped(family.value.upper())}"'
        for command in commands:
            told = {
                "oob": command.allow_oob, "slow": command.slow, "reads": not command.mutates,
                "unstable": command.unstable,
            }  # fmt: skip
            marks = [word for word, on in told.items() if on]
            yield f'.SS "{_escaped(command.name)}{" (" + ", ".join(marks) + ")" if marks else ""}"'
            yield from _declared(command.arguments)
        for event in events:
            yield f'.SS "{_escaped(event.name)} (event)"'
            yield from _declared(event.data)
    yield from _see("vfiod-commands(7)")


def _declared(declared: type[msgspec.Struct]) -> Iterator[str]:
    yield from _prose(inspect.getdoc(declared) or "")
    types = types_in_words(declared)
    for field in documented_fields(declared):
        left_out = "" if field.required else " (optional)"
        yield from _tagged(
            f"\\fB{_escaped(field.name)}\\fR{left_out}", field.description or f"Type: {types[field.name]}."
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
