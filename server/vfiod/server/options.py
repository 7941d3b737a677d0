"""The program's options: from the command line, and from a TOML file with the same names.

The command line wins over the file; an option that may be repeated replaces the file's list.
"""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from msgspec import Struct

from vfiod.protocol.catalogue.words import UUID_PATTERN
from vfiod.protocol.errors import VfiodError

__all__ = ["BusOption", "OptionError", "Options", "SocketOption", "parse"]

LEVELS: Final = ("debug", "info", "warning", "error")
SANDBOX: Final = ("on", "off", "required")
"""``--sandbox``: ``on`` goes on with what the kernel has, ``required`` does not."""

LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")
MAX_NAME: Final = 255
"""Characters of ``--name``."""


class OptionError(VfiodError):
    """An option or a key of the file is wrong: which, its value, and what is expected."""


class SocketOption(Struct, frozen=True):
    """Where to listen: a path, or an inherited listening fd; exactly one of them.

    Attributes:
        dialect: ``qmp`` or ``jsonrpc``.
        path: of a Unix socket to make.
        fd: an inherited, listening Unix socket.
        role: what its sessions may do.

    """

    dialect: str
    path: str | None = None
    fd: int | None = None
    role: str = "operator"

    def __str__(self) -> str:
        return f"unix:{self.path}" if self.path is not None else f"fd={self.fd}"


class BusOption(Struct, frozen=True):
    """Where a socket of the bus listens: a path; or host and port, which need keys.

    Attributes:
        path: of ``ipc:PATH``.
        host: of ``tcp:HOST:PORT``.
        port: of ``tcp:HOST:PORT``; 0: a free one.

    """

    path: str | None = None
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        return f"ipc:{self.path}" if self.path is not None else f"tcp:{self.host}:{self.port}"


class Options(Struct, frozen=True):
    """The options, checked."""

    name: str
    sockets: tuple[SocketOption, ...]
    uuid: str | None = None
    allow_open: bool = False
    allow_uid: frozenset[int] = frozenset()
    socket_gid: int | None = None
    pidfile: str | None = None
    log_level: int = logging.WARNING
    trace: tuple[str, ...] = ()
    roles: Mapping[str, tuple[str, ...]] = {}
    audit: str | None = None
    metrics_path: str | None = None
    metrics_port: tuple[str, int] | None = None
    bus: BusOption | None = None
    events: BusOption | None = None
    bus_key: str | None = None
    bus_clients: str | None = None
    sandbox: str = "off"
    allow_paths: tuple[str, ...] = ()
    allow_connect: bool = False


# What a TOML file may say: the options without their dashes, and the type of each.
_KEYS: Final[dict[str, type | tuple[type, ...]]] = {
    "name": str,
    "uuid": str,
    "qmp": (str, list),
    "jsonrpc": (str, list),
    "allow-open": bool,
    "allow-uid": (int, list),
    "socket-group": (str, int),
    "pidfile": str,
    "log-level": str,
    "trace": (str, list),
    "role": (str, list),
    "audit": str,
    "metrics": str,
    "bus": str,
    "events": str,
    "bus-key": str,
    "bus-clients": str,
    "sandbox": str,
    "allow-path": (str, list),
    "allow-connect": bool,
}
_TYPE_NAMES: Final = {str: "a string", int: "an integer", bool: "true or false", list: "a list"}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vfiod serve",
        description="Hold the VFIO devices of one VM, and serve them.",
        epilog="SOCKET is unix:PATH, a Unix socket to make, or fd=N, an inherited one that listens already; either may "
        "end in ,role=NAME: operator (all commands, the default), observer (those that change nothing), or one of "
        "--role.",
        allow_abbrev=False,
        argument_default=None,
    )
    add = parser.add_argument
    add("--name", metavar="VM", help="the name of the VM")
    add("--uuid", metavar="U", help="the UUID of the VM")
    add("--qmp", metavar="SOCKET", action="append", help="serve QMP here; may be repeated")
    add("--jsonrpc", metavar="SOCKET", action="append", help="serve JSON-RPC 2.0 here; may be repeated")
    add("--allow-open", action="store_true", default=None, help="let device_add open host devices by itself")
    add(
        "--allow-uid",
        metavar="UID",
        action="append",
        help="let this user in, besides root and our own; may be repeated",
    )
    add("--socket-group", metavar="G", help="give sockets to this group, mode 0660 instead of 0600")
    add("--pidfile", metavar="P", help="lock this file, and write the process id into it once ready")
    add("--log-level", metavar="L", help=f"what to log to stderr: {', '.join(LEVELS)} (warning)")
    add("--trace", metavar="PATTERN", action="append", help="switch trace points on; may be repeated")
    add("--role", metavar="NAME=PATTERN,...", action="append", help="make a role of the commands that match")
    add("--audit", metavar="FILE", help="note every command that may change something here; - is stderr")
    add("--metrics", metavar="ADDRESS", help="serve OpenMetrics over HTTP: unix:PATH, or HOST:PORT of this host itself")
    add("--bus", metavar="ADDRESS", help="serve JSON-RPC in msgpack on ZeroMQ: ipc:PATH, or tcp:HOST:PORT with keys")
    add("--events", metavar="ADDRESS", help="publish events on ZeroMQ: ipc:PATH, or tcp:HOST:PORT with keys")
    add("--bus-key", metavar="FILE", help="the CURVE key pair of the server (*.key_secret), for tcp:")
    add("--bus-clients", metavar="DIR", help="the public CURVE keys of the clients that may come in, for tcp:")
    add("--sandbox", metavar="on|off|required", help="give up privileges, files and system calls (off)")
    add(
        "--allow-path", metavar="[ro:]PATH", action="append", help="keep this reachable in the sandbox; may be repeated"
    )
    add("--allow-connect", action="store_true", default=None, help="let device_add connect to Unix sockets by itself")
    add("--config", metavar="FILE.toml", help="take options from a file; those given here win")
    return parser


def parse(arguments: Sequence[str]) -> Options:
    """Options from the command line, and the file it names.

    Raises OptionError; SystemExit for ``--help`` and for what argparse itself refuses.
    """
    given = {key.replace("_", "-"): value for key, value in vars(_parser().parse_args(arguments)).items()}
    config = given.pop("config")
    values = _read_config(config) if config is not None else {}
    values.update({key: value for key, value in given.items() if value is not None})
    return _checked(values)


def _read_config(path: str) -> dict[str, Any]:
    import tomllib  # here, because most servers are started without a file, and it costs a tenth of the start

    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
    except OSError as error:
        raise OptionError(f"Cannot read the configuration '{path}': {error.strerror}") from error
    except RecursionError:
        raise OptionError(f"The configuration '{path}' is nested too deeply: an option is a value or a list") from None
    except ValueError as error:  # also what is no UTF-8, and a number too long for Python
        raise OptionError(f"The configuration '{path}' is not TOML: {error}") from error
    for key, value in values.items():
        expected = _KEYS.get(key)
        if expected is None:
            import difflib

            near = difflib.get_close_matches(key, _KEYS, n=1)
            advice = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(_KEYS)}"
            raise OptionError(f"The configuration '{path}' has an unknown key '{key}': {advice}")
        types = expected if isinstance(expected, tuple) else (expected,)
        if type(value) not in types:  # a bool is an int to isinstance, and not here
            wanted = " or ".join(_TYPE_NAMES[one] for one in types)
            raise OptionError(f"The configuration '{path}': '{key}' is {value!r}, expected {wanted}")
    return values


def _checked(values: dict[str, Any]) -> Options:
    name = values.get("name")
    if not name:
        raise OptionError("--name is missing: give the VM's name")
    if len(name) > MAX_NAME or not name.isprintable():
        raise OptionError(f"--name expects at most {MAX_NAME} printable characters")
    uuid = values.get("uuid")
    if uuid is not None and not re.match(UUID_PATTERN, uuid):
        raise OptionError(f"--uuid expects a UUID in its 8-4-4-4-12 form, got '{uuid}'")
    sockets = tuple(
        _socket(dialect, text) for dialect in ("qmp", "jsonrpc") for text in _list(values.get(dialect), dialect)
    )
    bus, events = (_bus(key, values.get(key), values) for key in ("bus", "events"))
    if not sockets and bus is None:
        raise OptionError("No socket to serve: give --qmp or --jsonrpc with unix:PATH or fd=N, or --bus with ipc:PATH")
    if bus is not None and events is not None and bus == events and bus.port + (bus.path is not None):
        raise OptionError(f"{bus} is given twice: --bus and --events need sockets of their own")
    doubled = [
        one for index, one in enumerate(sockets) if (one.path, one.fd) in [(s.path, s.fd) for s in sockets[:index]]
    ]
    if doubled:
        raise OptionError(f"{doubled[0]} is given twice: each socket serves one dialect")
    metrics_path, metrics_port = _metrics(values.get("metrics"))
    return Options(
        name=name,
        uuid=None if uuid is None else uuid.lower(),
        sockets=sockets,
        allow_open=bool(values.get("allow-open", False)),
        allow_uid=frozenset(_uid(one) for one in _list(values.get("allow-uid"), "allow-uid")),
        socket_gid=_gid(values.get("socket-group")),
        pidfile=values.get("pidfile"),
        log_level=_level(values.get("log-level", "warning")),
        trace=tuple(str(one) for one in _list(values.get("trace"), "trace")),
        roles=_roles(_list(values.get("role"), "role")),
        audit=values.get("audit"),
        metrics_path=metrics_path,
        metrics_port=metrics_port,
        bus=bus,
        events=events,
        bus_key=values.get("bus-key"),
        bus_clients=values.get("bus-clients"),
        sandbox=_sandbox(values.get("sandbox", "off")),
        allow_paths=tuple(_path(one) for one in _list(values.get("allow-path"), "allow-path")),
        allow_connect=bool(values.get("allow-connect", False)),
    )


def _list(value: Any, key: str) -> list[Any]:
    values = [] if value is None else value if isinstance(value, list) else [value]
    wrong = [one for one in values if type(one) not in (str, int)]
    if wrong:
        raise OptionError(f"'{key}' holds {wrong[0]!r}, expected strings")
    return values


def _socket(dialect: str, text: Any) -> SocketOption:
    found = re.fullmatch(r"([a-z]*)([:=]?)(.*?)(?:,role=([^,=/]*))?", str(text), re.DOTALL)
    kind, separator, rest, role = found.groups("operator")  # type: ignore[union-attr]
    if kind == "unix" and separator == ":" and rest:
        return SocketOption(dialect, path=rest, role=role)
    if kind == "fd" and separator == "=" and rest.isascii() and rest.isdigit() and len(rest) <= 9:
        return SocketOption(dialect, fd=int(rest), role=role)
    raise OptionError(f"--{dialect} expects unix:PATH or fd=N, got '{text}'")


def _metrics(text: str | None) -> tuple[str | None, tuple[str, int] | None]:
    if text is None:
        return None, None
    if text.startswith("unix:") and len(text) > len("unix:"):
        return text.removeprefix("unix:"), None
    host, separator, port = text.rpartition(":")
    if separator and port.isascii() and port.isdigit() and int(port) < 1 << 16:
        if host.strip("[]") not in LOOPBACK:
            raise OptionError(f"--metrics serves this host only: give {' or '.join(LOOPBACK)}, not '{host}'")
        return None, (host.strip("[]"), int(port))
    raise OptionError(f"--metrics expects unix:PATH or HOST:PORT, got '{text}'")


def _roles(texts: list[Any]) -> dict[str, tuple[str, ...]]:
    roles: dict[str, tuple[str, ...]] = {}
    for text in texts:
        name, _, patterns = str(text).partition("=")
        if not re.fullmatch(r"[a-z][a-z0-9-]{0,31}", name) or not all(patterns.split(",")):
            raise OptionError(f"--role expects NAME=PATTERN,..., a name of lower-case letters, got '{text}'")
        if name in roles:
            raise OptionError(f"--role '{name}' is given twice: put all its patterns in one")
        roles[name] = tuple(patterns.split(","))
    return roles


def _bus(key: str, text: str | None, values: dict[str, Any]) -> BusOption | None:
    if text is None:
        return None
    kind, _, rest = text.partition(":")
    if kind == "ipc" and rest:
        return BusOption(path=rest)
    host, separator, port = rest.rpartition(":")
    if kind == "tcp" and separator and host and port.isascii() and port.isdigit() and int(port) < 1 << 16:
        missing = [name for name in ("bus-key", "bus-clients") if not values.get(name)]
        if missing:
            raise OptionError(f"--{key} {text} needs --{' and --'.join(missing)}: anything but ipc: is encrypted")
        return BusOption(host=host, port=int(port))
    raise OptionError(f"--{key} expects ipc:PATH or tcp:HOST:PORT, got '{text}'")


def _uid(text: Any) -> int:
    if isinstance(text, int) and text >= 0:
        return text
    if isinstance(text, str) and text.isascii() and text.isdigit() and len(text) <= 10:
        return int(text)
    raise OptionError(f"--allow-uid expects a user's number, got '{text}'")


def _gid(text: Any) -> int | None:
    if text is None:
        return None
    if isinstance(text, int) or (text.isascii() and text.isdigit()):
        return int(text)
    import grp

    try:
        return grp.getgrnam(text).gr_gid
    except KeyError as error:
        raise OptionError(f"--socket-group: there is no group '{text}'") from error


def _sandbox(text: str) -> str:
    if text not in SANDBOX:
        raise OptionError(f"--sandbox expects one of {', '.join(SANDBOX)}, got '{text}'")
    return text


def _path(text: Any) -> str:
    if not str(text).removeprefix("ro:").startswith("/"):
        raise OptionError(f"--allow-path expects an absolute path, after ro: when it shall only be read, got '{text}'")
    return str(text)


def _level(text: str) -> int:
    if text.lower() not in LEVELS:
        raise OptionError(f"--log-level expects one of {', '.join(LEVELS)}, got '{text}'")
    return int(getattr(logging, text.upper()))
