"""The program's options: from the command line, and from a TOML file with the same names.

The command line wins over the file; an option that may be repeated replaces the file's list. What there is, and what
each expects, is declared in :mod:`vfiod.protocol.settings`.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NoReturn

from msgspec import Struct

from vfiod.protocol.errors import VfiodError
from vfiod.protocol.settings import MAX_NAME, SERVE, serve_parser

if TYPE_CHECKING:
    from vfiod.server.configuration import Lines

__all__ = ["BusOption", "OptionError", "Options", "SocketOption", "parse"]

LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")
MAX_PORT: Final = (1 << 16) - 1


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
    """The options, checked.

    Attributes:
        config: the file.
        said: the options that the command line had; the file's keys of these names do not count.
        file_values: what the file says, by key.

    """

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
    sandbox: str = "on"
    allow_paths: tuple[str, ...] = ()
    allow_connect: bool = False
    fd_store: str = "auto"
    config: str | None = None
    said: frozenset[str] = frozenset()
    file_values: Mapping[str, Any] = {}
    log_format: str = "auto"
    hand_over: str | None = None
    take_over: str | None = None
    daemonize: bool = False


def parse(arguments: Sequence[str]) -> Options:
    """Options from the command line, and the file it names.

    Raises OptionError; SystemExit for ``--help`` and for what argparse itself refuses.
    """
    given = {key.replace("_", "-"): value for key, value in vars(serve_parser().parse_args(arguments)).items()}
    config = given.pop("config")
    in_file: dict[str, Any] = {}
    lines = None
    if config is not None:
        from vfiod.server import configuration  # most servers are started without a file

        try:
            in_file, lines = configuration.read(config)
        except configuration.ConfigurationError as error:
            raise OptionError(str(error)) from error
    said = {key: value for key, value in given.items() if value is not None}
    _check(said)
    return _Reader(in_file, said, lines).options(config)


def _check(said: dict[str, Any]) -> None:
    """Hold what the command line says against the declarations; numbers come in digits."""
    for setting in SERVE:
        value = said.get(setting.name)
        for one in value if isinstance(value, list) else [] if value is None else [value]:
            number = int in setting.types and isinstance(one, str) and re.fullmatch("-?[0-9]{1,20}", one)
            if int in setting.types and str not in setting.types and not number:
                raise OptionError(f"--{setting.name} expects {setting.expects}, got '{one}'")
            wrong = setting.wrong(int(one) if number else one)
            if wrong:
                raise OptionError(f"--{setting.name} {wrong}")


class _Reader:
    """Makes :class:`Options` of values that are right one by one.

    Args:
        in_file: by key, those of the file.
        said: those of the command line.
        lines: of the file.

    """

    def __init__(self, in_file: dict[str, Any], said: dict[str, Any], lines: Lines | None) -> None:
        self._values = {**in_file, **said}
        self._file_values = in_file
        self._said = said
        self._lines = lines

    def options(self, config: str | None) -> Options:
        """Raises OptionError when they do not fit together."""
        name = self._values.get("name")
        taking = self._values.get("take-over")
        if not name and not taking:
            raise OptionError("--name is missing: give the VM's name")
        if self._flag("daemonize") and not taking:
            raise OptionError(
                "--daemonize goes with --take-over: any other server stays the child of who looks after it"
            )
        name = name or ""  # that of the server whose place is taken
        if not name.isprintable():
            self._refuse("name", f"expects 1 to {MAX_NAME} printable characters, got {name!r}")
        uuid = self._values.get("uuid")
        sockets = tuple(_socket(dialect, one) for dialect in ("qmp", "jsonrpc") for one in self._list(dialect))
        for option in sockets:
            if option.fd is None and not option.path:
                self._refuse(option.dialect, "expects unix:PATH or fd=N, got 'unix:'")
        bus, events = (self._bus(key) for key in ("bus", "events"))
        if not sockets and bus is None and not taking:
            raise OptionError(
                "No socket to serve: give --qmp or --jsonrpc with unix:PATH or fd=N, or --bus with ipc:PATH"
            )
        if bus is not None and events is not None and bus == events and bus.port + (bus.path is not None):
            raise OptionError(f"{bus} is given twice: --bus and --events need sockets of their own")
        doubled = [
            one for index, one in enumerate(sockets) if (one.path, one.fd) in [(s.path, s.fd) for s in sockets[:index]]
        ]
        if doubled:
            raise OptionError(f"{doubled[0]} is given twice: each socket serves one dialect")
        metrics_path, metrics_port = self._metrics()
        return Options(
            name=name,
            uuid=None if uuid is None else uuid.lower(),
            sockets=sockets,
            allow_open=self._flag("allow-open"),
            allow_uid=frozenset(map(int, self._list("allow-uid"))),
            socket_gid=self._gid(),
            pidfile=self._values.get("pidfile"),
            log_level=getattr(logging, self._said_or_standard("log-level").upper()),
            trace=tuple(self._list("trace")),
            roles=self._roles(),
            audit=self._values.get("audit"),
            metrics_path=metrics_path,
            metrics_port=metrics_port,
            bus=bus,
            events=events,
            bus_key=self._values.get("bus-key"),
            bus_clients=self._values.get("bus-clients"),
            sandbox=self._said_or_standard("sandbox").lower(),
            allow_paths=(*self._list("allow-path"), *self._files_kept(config)),
            allow_connect=self._flag("allow-connect"),
            fd_store=self._said_or_standard("fd-store").lower(),
            config=config,
            said=frozenset(self._said),
            file_values=self._file_values,
            log_format=self._said_or_standard("log-format").lower(),
            hand_over=self._path("hand-over"),
            take_over=self._path("take-over"),
            daemonize=self._flag("daemonize"),
        )

    @staticmethod
    def _files_kept(config: str | None) -> list[str]:
        """What stays readable to be read again: the one file, and not what is put in its place."""
        return [] if config is None else [f"ro:{os.path.abspath(config)}"]

    def _refuse(self, key: str, sentence: str) -> NoReturn:
        """Say it with the option, or the file and the line."""
        if key in self._said or self._lines is None:
            raise OptionError(f"--{key} {sentence}")
        raise OptionError(f"{self._lines.of(key)}: '{key}' {sentence}")

    def _list(self, key: str) -> list[Any]:
        value = self._values.get(key)
        return [] if value is None else value if isinstance(value, list) else [value]

    def _said_or_standard(self, key: str) -> str:
        return str(self._values.get(key) or next(one.standard for one in SERVE if one.name == key))

    def _path(self, key: str) -> str | None:
        text = self._values.get(key)
        return None if text is None else str(text).removeprefix("unix:")

    def _flag(self, key: str) -> bool:
        return bool(self._values.get(key, False))

    def _gid(self) -> int | None:
        group = self._values.get("socket-group")
        if group is None or isinstance(group, int):
            return group
        if group.isascii() and group.isdigit():
            return int(group)
        import grp

        try:
            return grp.getgrnam(group).gr_gid
        except KeyError:
            self._refuse("socket-group", f"names no group of this system: '{group}'")

    def _metrics(self) -> tuple[str | None, tuple[str, int] | None]:
        text = self._values.get("metrics")
        if text is None:
            return None, None
        if text.startswith("unix:"):
            return text.removeprefix("unix:"), None
        host, _, port = text.rpartition(":")
        if int(port) > MAX_PORT:
            self._refuse("metrics", f"expects a port up to {MAX_PORT}, got '{text}'")
        if host.strip("[]") not in LOOPBACK:
            self._refuse("metrics", f"serves this host only: give {' or '.join(LOOPBACK)}, not '{host}'")
        return None, (host.strip("[]"), int(port))

    def _roles(self) -> dict[str, tuple[str, ...]]:
        roles: dict[str, tuple[str, ...]] = {}
        for text in self._list("role"):
            name, _, patterns = text.partition("=")
            if name in roles:
                self._refuse("role", f"'{name}' is given twice: put all its patterns in one")
            roles[name] = tuple(patterns.split(","))
        return roles

    def _bus(self, key: str) -> BusOption | None:
        text = self._values.get(key)
        if text is None:
            return None
        if text.startswith("ipc:"):
            return BusOption(path=text.removeprefix("ipc:"))
        host, _, port = text.removeprefix("tcp:").rpartition(":")
        if int(port) > MAX_PORT:
            self._refuse(key, f"expects a port up to {MAX_PORT}, got '{text}'")
        missing = [name for name in ("bus-key", "bus-clients") if not self._values.get(name)]
        if missing:
            self._refuse(key, f"{text} needs --{' and --'.join(missing)}: anything but ipc: is encrypted")
        return BusOption(host=host, port=int(port))


def _socket(dialect: str, text: str) -> SocketOption:
    """A text that its declaration has let through."""
    place, separator, role = text.rpartition(",role=")
    if not separator or re.search("[,=/]", role):
        place, role = text, "operator"
    if place.startswith("fd="):
        return SocketOption(dialect, fd=int(place.removeprefix("fd=")), role=role)
    return SocketOption(dialect, path=place.removeprefix("unix:"), role=role)
