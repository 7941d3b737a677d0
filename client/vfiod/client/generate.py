"""Writes ``vfiod.client.methods`` from the catalogue: ``python -m vfiod.client.generate``.

Type checkers and editors need real methods, so the catalogue is printed once, here, as Python; a test holds the
files to what this script would write. Three modules come out: ``values`` (the pictures of arguments and results
that carry fds as objects rather than as names and indexes), ``aio`` and ``sync`` (one method per command).
"""

from __future__ import annotations

import ast
import enum
import subprocess
import sys
import textwrap
import types
import typing
from pathlib import Path
from typing import Any, Final, Literal, get_args, get_origin

import msgspec
from msgspec import UNSET, UnsetType

from vfiod.client.annotations import (
    FD_META,
    all_parts,
    hints,
    is_fd,
    is_fd_index,
    is_fd_list,
    lends,
    metas,
    owns,
    parts,
    structs,
)
from vfiod.protocol.catalogue import COMMANDS, CommandSpec

__all__ = ["generate", "is_current", "main"]

METHODS: Final = Path(__file__).parent / "methods"
#: Commands that take the oldest fd of the session: their methods take it along.
TAKES_PENDING_FD: Final = frozenset({"getfd", "add-fd"})
RESERVED: Final = frozenset({"fds", "attach", "oob", "timeout", "self", "lent"})
WIDTH: Final = 116
# The sentences are the catalogue's, and both skins wait by the same argument.
NO_LINT: Final = "# ruff: noqa: "


class Printer:
    """Prints annotations as Python, and remembers what must be imported for it."""

    def __init__(self) -> None:
        self.imports: dict[str, set[str]] = {}

    def use(self, kind: type) -> str:
        """A class's name, imported from the catalogue."""
        self.imports.setdefault(kind.__module__, set()).add(kind.__name__)
        return kind.__name__

    def type(self, annotation: Any, *, argument: bool, inside: bool = False) -> str:
        """An annotation as a type checker is to see it; ``inside``: as the items of a list."""
        if get_origin(annotation) is typing.Annotated:
            if annotation is not None and argument and any(meta == FD_META for meta in metas(annotation)):
                return self.type(get_args(annotation)[0], argument=False).replace("str", "Fd", 1)
            return self.type(get_args(annotation)[0], argument=argument)
        origin = get_origin(annotation)
        if origin in (typing.Union, types.UnionType):
            return " | ".join(self.type(part, argument=argument) for part in get_args(annotation))
        if origin is Literal:
            return f"Literal[{', '.join(repr(value) for value in get_args(annotation))}]"
        if origin is not None:
            items = ", ".join(self.type(part, argument=argument, inside=True) for part in get_args(annotation))
            return f"{origin.__name__}[{items}]"
        if annotation is Any:
            return "Any"
        if annotation in (str, int, float, bool, bytes, UnsetType, type(None)):
            return "None" if annotation is type(None) else annotation.__name__
        if issubclass(annotation, enum.Enum):
            name = self.use(annotation)
            return (
                f"{name} | Literal[{', '.join(repr(m.value) for m in annotation)}]" if argument and not inside else name
            )
        if argument and lends(annotation):
            return f"values.{annotation.__name__}"
        if owns(annotation):
            return f"values.{annotation.__name__}"
        return self.use(annotation)

    def default(self, value: Any) -> str:
        """A default as Python."""
        if value is UNSET:
            return "UNSET"
        if isinstance(value, enum.Enum):
            return f"{self.use(type(value))}.{value.name}"
        return repr(value)

    def lines(self) -> str:
        """The import lines."""
        return "\n".join(
            f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(self.imports.items())
        )


def field_defaults(kind: type) -> dict[str, Any]:
    """Defaults of members that have one."""
    fields = msgspec.structs.fields(kind)
    return {field.name: field.default for field in fields if field.default is not msgspec.NODEFAULT}


def bounds(annotation: Any) -> str:
    """What the constraints say, in words: ``0 or more``."""
    words = []
    for meta in metas(annotation):
        if meta.ge is not None and meta.le is not None:
            words.append(f"{meta.ge} to {meta.le}")
        elif meta.ge is not None and meta.lt is not None:
            words.append(f"{meta.ge} to {meta.lt - 1}")
        elif meta.ge is not None:
            words.append(f"{meta.ge} or more")
        elif meta.gt is not None:
            words.append(f"above {meta.gt}")
        if meta.min_length is not None and meta.max_length is not None:
            words.append(f"length {meta.min_length} to {meta.max_length}")
    return ", ".join(dict.fromkeys(words))


def describe(annotation: Any) -> str:
    """What is known of an argument: its last description and its bounds."""
    said = [meta.description for meta in metas(annotation) if meta.description]
    text = said[-1].rstrip(".") if said else ""
    if is_fd(annotation):
        own = [s for s in said if s != FD_META.description]
        text = (own[-1] + " " if own else "") + "An open fd, lent; or a name the server knows"
    limits = bounds(annotation)
    return f"{text} ({limits})." if text and limits else f"{limits}." if limits else f"{text}." if text else ""


def docstring(spec: CommandSpec, *, indent: int) -> str:
    """The command's description, its arguments, its result."""
    body = textwrap.dedent("    " + (spec.arguments.__doc__ or "").strip()).strip()
    lines = [body, "", "Args:"]
    extra = {"timeout": "Seconds to wait for the answer; None: the client's own default."}
    if spec.allow_oob:
        extra = {"oob": "Run out of band, ahead of commands that wait."} | extra
    if spec.name in TAKES_PENDING_FD:
        extra = {"fd": "An open fd, lent: it travels with the command. None: one sent before."} | extra
    told = {name: describe(hint) for name, hint in hints(spec.arguments).items()}
    for name, text in (told | extra).items():
        if text:
            lines += textwrap.wrap(
                f"{name}: {text}", WIDTH - indent, initial_indent="    ", subsequent_indent="        "
            )
    if owns(spec.returns):
        lines += ["", "Returns:", "    The result. Its fds are the caller's: close it, or use it in ``with``."]
    lines += ["", "Raises:"]
    lines += ["    RemoteError: the server refuses, or failed. ConnectionLost, RequestTimedOut: no answer.", ""]
    text = textwrap.indent("\n".join(lines), " " * indent).strip()
    return f'{" " * indent}"""{text}\n\n{" " * indent}"""'


def method(spec: CommandSpec, printer: Printer, *, asynchronous: bool) -> str:
    """One command as a method."""
    members = hints(spec.arguments)
    if clash := RESERVED & members.keys():
        raise SystemExit(f"{spec.name}: members {sorted(clash)} clash with the methods' own arguments")
    defaults = field_defaults(spec.arguments)
    parameters, passed = [], []
    lending = False
    for name, hint in members.items():
        default = f" = {printer.default(defaults[name])}" if name in defaults else ""
        lent_parts = [part for part in structs(hint) if lends(part)]
        kind = printer.type(hint, argument=True)
        value = name
        if is_fd(hint):
            value, lending = f"lent.name({name})", True
        elif is_fd_list(hint):
            # A caller's list of its own kind of fds is no list of fds in general: lists can be written to.
            kind = kind.replace("list[Fd]", "Sequence[Fd]")
            value, lending = f"{name} if isinstance({name}, UnsetType) else [lent.name(one) for one in {name}]", True
        elif lent_parts:
            lending = True
            value = f"{name} if isinstance({name}, UnsetType) else [part.lend(lent) for part in {name}]"
        elif any(issubclass(part, enum.Enum) for part in parts(hint)) and "list[" not in kind:
            enumeration = next(part for part in parts(hint) if issubclass(part, enum.Enum))
            made = f"{printer.use(enumeration)}({name})"
            value = f"{name} if isinstance({name}, UnsetType) else {made}" if "UnsetType" in kind else made
        parameters.append(f"{name}: {kind}{default}")
        passed.append(f"{name}={value}")
    # Python wants those without a default first; keyword-only parameters need no order, people do.
    parameters.sort(key=lambda text: " = " in text)
    if spec.name in TAKES_PENDING_FD:
        parameters.append("fd: OpenFd | None = None")
    if spec.allow_oob:
        parameters.append("oob: bool = False")
    parameters.append("timeout: float | None = None")
    call = [f"{printer.use(spec.arguments)}({', '.join(passed)})"]
    if lending:
        call.append("fds=lent.named")
    if spec.name in TAKES_PENDING_FD:
        call.append("attach=() if fd is None else (fd,)")
    if spec.allow_oob:
        call.append("oob=oob")
    call.append("timeout=timeout")
    returns = printer.type(spec.returns, argument=False)
    head = "async def" if asynchronous else "def"
    wait = "await " if asynchronous else ""
    lines = [f"    {head} {spec.name.replace('-', '_')}(self, *, {', '.join(parameters)}) -> {returns}:"]
    lines.append(docstring(spec, indent=8))
    if lending:
        lines.append("        lent = LentFds()")
    lines.append(f"        return {wait}self.call({', '.join(call)})")
    return "\n".join(lines)


def methods_module(*, asynchronous: bool) -> str:
    """The module of one skin."""
    printer = Printer()
    name = "AsyncMethods" if asynchronous else "Methods"
    head = "async def" if asynchronous else "def"
    options = (
        "fds: Mapping[str, OpenFd] | None = None, attach: Sequence[OpenFd] = (), oob: bool = False, "
        "timeout: float | None = None"
    )
    body = [f"class {name}:", '    """Every command of the catalogue as a method. Arguments are keyword-only."""', ""]
    for spec in COMMANDS.values():
        if owns(spec.returns):
            body.append("    @overload")
            body.append(
                f"    {head} call(self, arguments: {printer.use(spec.arguments)}, *, {options}) "
                f"-> {printer.type(spec.returns, argument=False)}: ...\n"
            )
    body.append(f"    @overload\n    {head} call(self, arguments: Arguments[R], *, {options}) -> R: ...\n")
    wait = "await " if asynchronous else ""
    body.append(f"    {head} call(self, arguments: Arguments[Any], *, {options}) -> Any:")
    body.append(
        textwrap.indent(
            '"""Run a command declared in the catalogue, and return its typed result.\n\n'
            "Args:\n"
            "    arguments: the command, with its arguments.\n"
            "    fds: open fds the arguments refer to by these names, lent; at most 253.\n"
            "    attach: open fds that travel with the command itself, lent, and wait at the server for ``getfd``.\n"
            "    oob: run out of band, ahead of commands that wait (QMP; commands that allow it).\n"
            "    timeout: seconds to wait for the answer; None: the client's own default.\n\n"
            "Raises:\n"
            "    RemoteError: the server refuses, or failed: the machine is as it was, the names of ``fds`` are gone.\n"
            "    ConnectionLost, RequestTimedOut: no answer.\n\n"
            '"""',
            "        ",
        )
    )
    body.append(f"        return {wait}self._run(arguments, fds=fds, attach=attach, oob=oob, timeout=timeout)\n")
    body.append(f"    {head} _run(self, arguments: Arguments[Any], *, {options}) -> Any:")
    body.append(f"        raise NotImplementedError  # {'AsyncClient' if asynchronous else 'Client'} does it\n")
    for spec in COMMANDS.values():
        body.append(method(spec, printer, asynchronous=asynchronous) + "\n")
    printer.imports.setdefault("vfiod.protocol.catalogue.declare", set()).add("Arguments")
    what = "asyncio" if asynchronous else "synchronous"
    return "\n".join(
        [
            f'"""The commands as typed methods, {what}. Written by ``vfiod.client.generate``: do not edit."""',
            "",
            NO_LINT + ("D417, E501, ASYNC109" if asynchronous else "D417, E501"),
            "",
            "from __future__ import annotations",
            "",
            "from collections.abc import Mapping, Sequence",
            "from typing import Any, Literal, TypeVar, overload",
            "",
            "from msgspec import UNSET, UnsetType",
            "",
            "from vfiod.client.fds import Fd, LentFds, OpenFd",
            "from vfiod.client.methods import values",
            printer.lines(),
            "",
            f'__all__ = ["{name}"]',
            "",
            'R = TypeVar("R")',
            "",
            "",
            *body,
        ]
    )


def value_class(kind: type, printer: Printer, *, lending: bool) -> str:
    """The client's picture of a declaration that carries fds."""
    defaults = field_defaults(kind)
    fields, moved = [], []
    for name, hint in hints(kind).items():
        text = printer.type(hint, argument=False)
        value = f"self.{name}" if lending else f"result.{name}"
        inner = [part for part in structs(hint) if (lends(part) if lending else owns(part))]
        if lending and is_fd(hint):
            text, value = text.replace("str", "Fd", 1), f"lent.name(self.{name})"
        elif not lending and is_fd_index(name, hint):
            text, value = text.replace("int", "FileDescriptor", 1), f"fds.take(result.{name})"
        elif inner:
            if lending:
                raise SystemExit(f"{kind.__name__}.{name}: fds two levels deep in arguments are not provided for")
            text = text.replace("values.", "")
            value = f"[{inner[0].__name__}.own(part, fds) for part in result.{name}]"
        default = f" = {printer.default(defaults[name])}" if name in defaults else ""
        fields.append((f"    {name}: {text}{default}", describe(hint)))
        moved.append(f"{name}={value}")
    # The catalogue's class has the same name: it is reached through its module.
    module = kind.__module__
    original = f"{module.rsplit('.', 1)[1]}.{kind.__name__}"
    printer.imports.setdefault(module.rsplit(".", 1)[0], set()).add(module.rsplit(".", 1)[1])
    about = textwrap.dedent("    " + (kind.__doc__ or "").strip()).strip()
    lent = "fds are open ones, lent, or names the server knows."
    note = lent if lending else "fds are objects, and the caller's to close."
    lines = ["@dataclass(frozen=True, slots=True, kw_only=True)"]
    lines.append(f"class {kind.__name__}{'' if lending else '(HoldsFds)'}:")
    lines.append(textwrap.indent(f'"""{about}\n\nThe client\'s picture of it: {note}\n"""', "    ") + "\n")
    for field, text in fields:
        lines.append(field)
        if text:
            lines.append(textwrap.indent(f'"""{text}"""', "    "))
    lines.append("")
    if lending:
        lines.append(f"    def lend(self, lent: LentFds) -> {original}:")
        lines.append('        """As the catalogue has it, with a name for each open fd."""')
        lines.append(f"        return {original}({', '.join(moved)})\n")
    else:
        lines.append("    @classmethod")
        lines.append(f"    def own(cls, result: {original}, fds: OwnedFds) -> Self:")
        lines.append('        """From the catalogue\'s, taking each fd it refers to."""')
        lines.append(f"        return cls({', '.join(moved)})\n")
    return "\n".join(lines) + "\n"


def values_module() -> str:
    """The module of pictures with fds in them."""
    printer = Printer()
    body, table = [], []
    seen: set[type] = set()
    for spec in COMMANDS.values():
        for hint in hints(spec.arguments).values():
            for part in all_parts(hint):
                if lends(part) and part not in seen:
                    seen.add(part)
                    body.append(value_class(part, printer, lending=True))
        for part in all_parts(spec.returns):
            if owns(part) and part not in seen:
                seen.add(part)
                body.append(value_class(part, printer, lending=False))
        if owns(spec.returns):
            table.append(f'    "{spec.name}": {spec.returns.__name__}.own,')
    names = [kind.__name__ for kind in seen]
    return "\n".join(
        [
            '"""Arguments and results with the fds in them. Written by ``vfiod.client.generate``: do not edit."""',
            "",
            NO_LINT + "E501",
            "",
            "from __future__ import annotations",
            "",
            "from collections.abc import Callable",
            "from dataclasses import dataclass",
            "from typing import Any, Final, Self",
            "",
            "from msgspec import UNSET, UnsetType",
            "",
            "from vfiod.client.fds import Fd, HoldsFds, LentFds, OwnedFds",
            printer.lines(),
            "from vfiod.protocol.fd import FileDescriptor",
            "",
            f"__all__ = {['OWN', *sorted(names)]!r}",
            "",
            "",
            *body,
            "OWN: Final[dict[str, Callable[[Any, OwnedFds], Any]]] = {",
            *table,
            "}",
            '"""For each command whose result carries fds: how the client\'s picture is made of it."""',
            "",
        ]
    )


def generate() -> dict[str, str]:
    """The text of each module, by file name, before formatting."""
    return {
        "values.py": values_module(),
        "aio.py": methods_module(asynchronous=True),
        "sync.py": methods_module(asynchronous=False),
    }


def is_current(name: str, text: str) -> bool:
    """Whether the file of this name says the same. Formatting does not count; imports may be sorted."""

    def essence(source: str) -> list[str]:
        nodes = ast.parse(source).body
        imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
        names = sorted(f"{node.module}.{alias.name}" for node in imports for alias in node.names)
        return names + [ast.dump(node) for node in nodes if not isinstance(node, ast.ImportFrom)]

    path = METHODS / name
    return path.exists() and essence(path.read_text()) == essence(text)


def main() -> None:
    """Write the modules, and let ruff lay them out."""
    METHODS.mkdir(exist_ok=True)
    paths = []
    for name, text in generate().items():
        path = METHODS / name
        path.write_text(text)
        paths.append(str(path))
        print(f"wrote {path}", file=sys.stderr)
    for step in (["check", "--select", "I,F401,RUF022", "--fix", "--quiet"], ["format", "--quiet"]):
        subprocess.run([sys.executable, "-m", "ruff", *step, *paths], check=True)


if __name__ == "__main__":
    main()
