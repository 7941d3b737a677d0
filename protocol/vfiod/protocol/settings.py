"""What ``vfiod serve`` and ``vfiod mdev serve`` can be told: one declaration per option and key of the TOML file.

From it come the command line, the checks of the file, its JSON schema, ``docs/configuration.md``, the manual pages and
the shells' completion. The server takes values from here, the client's generators the words; neither knows the other.
"""

from __future__ import annotations

import argparse
import re
from typing import Any, Final

from msgspec import Struct

from vfiod.protocol.catalogue.words import UUID_PATTERN

__all__ = [
    "ALLOW_PATH",
    "LEVELS",
    "LOG_FORMATS",
    "MDEV_SERVE",
    "SERVE",
    "Setting",
    "add_to",
    "mdev_serve_parser",
    "serve_parser",
]

LEVELS: Final = ("debug", "info", "warning", "error")
"""``--log-level``."""

LOG_FORMATS: Final = ("auto", "plain", "json", "journal")
"""``--log-format``."""

MAX_NAME: Final = 255
"""Characters of ``--name``."""

MAX_USER: Final = (1 << 32) - 2
"""The highest uid and gid: the next is -1, "nobody in particular" (``chown(2)``)."""

SOCKET_PATTERN: Final = r"^(unix:[\s\S]+|fd=[0-9]{1,9}(,role=[^,=/]*)?)$(?!\n)"
BUS_PATTERN: Final = r"^(ipc:[\s\S]+|tcp:[\s\S]+:[0-9]{1,5})$(?!\n)"

SOCKETS: Final = (
    "SOCKET is unix:PATH, a Unix socket to make, or fd=N, an inherited one that listens already; either may end in "
    ",role=NAME: operator (all commands, the default), observer (those that change nothing), or one of --role."
)


class Setting(Struct, frozen=True, kw_only=True):
    """One option, ``--name``, and the key ``name`` of the file.

    Attributes:
        name: of both.
        help: one line.
        metavar: what stands for its value; empty: it is a flag, true or false in the file.
        types: the file's types of one value; a number is written in digits on the command line.
        many: it may be repeated; in the file, a value or a list of values.
        choices: all there are, written in small letters.
        pattern: a regular expression that a text matches (Python's, and ECMA 262's).
        least: of a number.
        most: of a number; characters of a text.
        expects: the rule in words, after "expects".
        standard: what holds when it is not said, as it is written on the command line; empty: nothing.
        offers: what a shell may complete: ``file``, ``directory``, or nothing.
        required: the command line must have it (``vfiod mdev serve``).
        in_file: it is a key of the file, too.
        more: what else there is to know, for the manual.
        example: a value, as TOML has it.

    """

    name: str
    help: str
    metavar: str = ""
    types: tuple[type, ...] = (str,)
    many: bool = False
    choices: tuple[str, ...] = ()
    pattern: str = ""
    least: int = 0
    most: int = 0
    expects: str = ""
    standard: str = ""
    offers: str = ""
    required: bool = False
    in_file: bool = True
    more: str = ""
    example: str = ""

    @property
    def flag(self) -> bool:
        """Whether it has no value on the command line."""
        return not self.metavar

    def wrong(self, value: Any) -> str:
        """What is wrong with one value of the right type, in words; empty: nothing."""
        if isinstance(value, int) and not isinstance(value, bool):
            return "" if self.least <= value <= self.most else f"expects {self.expects}, got {value!r}"
        if not isinstance(value, str):
            return ""
        if self.choices:
            return "" if value.lower() in self.choices else f"expects one of {', '.join(self.choices)}, got '{value}'"
        long = int not in self.types and 0 < self.most < len(value)
        if long or (self.pattern and not re.search(self.pattern, value)):
            shown = value if value.isprintable() else repr(value)[1:-1]
            return f"expects {self.expects}, got '{shown[: MAX_NAME + 1]}'"
        return ""


def _flag(name: str, help: str, more: str = "") -> Setting:
    return Setting(name=name, help=help, types=(bool,), more=more, example="true")


def _address(name: str, help: str, more: str) -> Setting:
    return Setting(
        name=name, metavar="ADDRESS", help=help, pattern=BUS_PATTERN, expects="ipc:PATH or tcp:HOST:PORT", more=more,
        example=f'"ipc:/run/vfiod/vm1/{name}"',
    )  # fmt: skip


def _socket(name: str, what: str) -> Setting:
    return Setting(
        name=name, metavar="SOCKET", help=f"serve {what} here; may be repeated", many=True, pattern=SOCKET_PATTERN,
        expects="unix:PATH or fd=N", more=SOCKETS,
        example='["unix:/run/vfiod/vm1/qmp", "unix:/run/vfiod/vm1/look,role=observer"]',
    )  # fmt: skip


_LOG_LEVEL: Final = Setting(
    name="log-level", metavar="L", help=f"what to log: {', '.join(LEVELS)} (warning)", choices=LEVELS,
    standard="warning", example='"info"',
)  # fmt: skip
_ALLOW_UID: Final = Setting(
    name="allow-uid", metavar="UID", help="let this user in, besides root and our own; may be repeated", many=True,
    types=(int,), most=MAX_USER, expects="a user's number", example="[107]",
)  # fmt: skip

_SANDBOX: Final = Setting(
    name="sandbox", metavar="on|off|required", help="give up privileges, files and system calls (on)",
    choices=("on", "off", "required"), standard="on", example='"required"',
    more="on goes on with what the kernel has, required does not; off is for finding out whether it is the sandbox.",
)  # fmt: skip
ALLOW_PATH: Final = Setting(
    name="allow-path", metavar="[ro:]PATH", help="keep this reachable in the sandbox; may be repeated", many=True,
    pattern=r"^(ro:)*/", expects="an absolute path, after ro: when it shall only be read", offers="file",
    example='["ro:/usr/share/vfiod/roms"]',
)  # fmt: skip

SERVE: Final = (
    Setting(
        name="name", metavar="VM", help="the name of the VM", pattern=r"^[^\x00-\x1f\x7f]+$(?!\n)", most=MAX_NAME,
        expects=f"1 to {MAX_NAME} printable characters", example='"vm1"',
        more="The only option that is always needed, here or in the file.",
    ),
    Setting(
        name="uuid", metavar="U", help="the UUID of the VM", pattern=UUID_PATTERN,
        expects="a UUID in its 8-4-4-4-12 form", example='"4dbf9fe8-0000-4000-8000-000000000001"',
    ),
    _socket("qmp", "QMP"),
    _socket("jsonrpc", "JSON-RPC 2.0"),
    _flag("allow-open", "let device_add open host devices by itself", "Without it, devices come as fds."),
    _ALLOW_UID,
    Setting(
        name="socket-group", metavar="G", help="give sockets to this group, mode 0660 instead of 0600",
        types=(str, int), most=MAX_USER, example='"kvm"',
        expects=f"a group's name, or its number of at most {MAX_USER}",
    ),
    Setting(
        name="pidfile", metavar="P", help="lock this file, and write the process id into it once ready", offers="file",
        example='"/run/vfiod/vm1/pid"',
    ),
    _LOG_LEVEL,
    Setting(
        name="log-format", metavar="F", help=f"{', '.join(LOG_FORMATS)}: in which form (auto)", choices=LOG_FORMATS,
        standard="auto", example='"json"',
        more="plain: lines on stderr; json: JSON lines on stderr; journal: entries with fields, by journald's native"
        " protocol; auto: journal where stderr is connected to it, else plain. With fields, events are logged too.",
    ),
    Setting(
        name="trace", metavar="PATTERN", help="switch trace points on; may be repeated", many=True,
        example='["irq_*", "reset_*"]', more="Trace points are written at level info, whatever --log-level says.",
    ),
    Setting(
        name="role", metavar="NAME=PATTERN,...", help="make a role of the commands that match", many=True,
        pattern=r"^[a-z][a-z0-9-]{0,31}=[^,]+(,[^,]+)*$(?!\n)", example='["power=query-*,cont,stop"]',
        expects="NAME=PATTERN,..., a name of lower-case letters",
    ),
    Setting(
        name="audit", metavar="FILE", help="note every command that may change something here; - is stderr",
        offers="file", example='"/var/log/vfiod/vm1.audit"',
        more="One JSON object per line. Where standard error is the journal, - makes entries of it.",
    ),
    Setting(
        name="metrics", metavar="ADDRESS", pattern=r"^(unix:[\s\S]+|[\s\S]+:[0-9]{1,5})$(?!\n)",
        help="serve OpenMetrics over HTTP: unix:PATH, or HOST:PORT of this host itself",
        expects="unix:PATH or HOST:PORT", example='"unix:/run/vfiod/vm1/metrics"',
    ),
    _address(
        "bus", "serve JSON-RPC in msgpack on ZeroMQ: ipc:PATH, or tcp:HOST:PORT with keys",
        "Anything but ipc: is encrypted, and needs --bus-key and --bus-clients.",
    ),
    _address("events", "publish events on ZeroMQ: ipc:PATH, or tcp:HOST:PORT with keys", "As --bus."),
    Setting(
        name="bus-key", metavar="FILE", help="the CURVE key pair of the server (*.key_secret), for tcp:", offers="file",
        example='"/etc/vfiod/keys/vm1.key_secret"',
    ),
    Setting(
        name="bus-clients", metavar="DIR", help="the public CURVE keys of the clients that may come in, for tcp:",
        offers="directory", example='"/etc/vfiod/keys/clients"',
    ),
    _SANDBOX,
    ALLOW_PATH,
    _flag("allow-connect", "let device_add connect to Unix sockets by itself"),
    Setting(
        name="fd-store", metavar="auto|on|off", choices=("auto", "on", "off"), standard="auto", example='"on"',
        help="keep fds and state with who started us, so that a crash loses no device (auto)",
        more="auto: when $FDSTORE says that there is a store (systemd 254 and later, vfiod keeper); on: whenever there "
        "is $NOTIFY_SOCKET, for an earlier systemd with FileDescriptorStoreMax=.",
    ),
    Setting(
        name="hand-over", metavar="unix:PATH", pattern=r"^unix:[\s\S]+$(?!\n)", expects="unix:PATH",
        help="let a new vfiod serve --take-over take everything over here",
        example='"unix:/run/vfiod/vm1/hand-over"', offers="file",
        more="Mode 0600; root and our own user may come in.",
    ),
    Setting(
        name="take-over", metavar="unix:PATH", pattern=r"^unix:[\s\S]+$(?!\n)", expects="unix:PATH", in_file=False,
        help="take the place of the running server that hands over here", offers="file",
        more="Its sockets, sessions, exports and devices go on here; --name and sockets may then be left out.",
    ),
    Setting(
        name="daemonize", types=(bool,), in_file=False,
        help="with --take-over: come back when it serves, and go on in the background",
        more="Exit status 0: it serves; 1: it does not, and the other one goes on. For ExecReload= of systemd.",
    ),
    Setting(
        name="config", metavar="FILE.toml", help="take options from a file; those given here win", offers="file",
        in_file=False, more="Its keys are these options without their dashes; see vfiod.toml(5).",
    ),
)  # fmt: skip
"""The options of ``vfiod serve``, in the order of its help."""

MDEV_SERVE: Final = (
    Setting(
        name="type", metavar="T", required=True,
        help="what to make: a type of a built-in or installed parent, primer-pci",
    ),
    Setting(
        name="socket-path", metavar="PATH", help="make a socket here (0600), serve one client after another",
        offers="file",
    ),
    Setting(
        name="fd", metavar="FDNUM", types=(int,), help="serve on this inherited socket: listening, or connected"
    ),
    Setting(
        name="parameter", metavar="KEY=VALUE", many=True, help="of the type; a value is JSON, or text",
    ),
    Setting(name="allow-uid", metavar="UID", types=(int,), many=True, help="let this user in, too; may be repeated"),
    Setting(
        name="share-fd", metavar="on|off", choices=("on", "off"), standard="on",
        help="whether clients may map regions (on)",
    ),
    _SANDBOX,
    ALLOW_PATH,
    _LOG_LEVEL,
)  # fmt: skip
"""The options of ``vfiod mdev serve``; it has no file."""


def add_to(parser: Any, setting: Setting, **more: Any) -> None:
    """Give an argparse parser this option. ``None`` is what it has when it was not given."""
    if setting.flag:
        parser.add_argument(f"--{setting.name}", action="store_true", default=None, help=setting.help)
    else:
        action = "append" if setting.many else "store"
        parser.add_argument(
            f"--{setting.name}", metavar=setting.metavar, action=action, required=setting.required,
            help=setting.help.replace("%", "%%"), **more,
        )  # fmt: skip


def serve_parser() -> argparse.ArgumentParser:
    """The command line of ``vfiod serve``: texts, not looked at."""
    parser = argparse.ArgumentParser(
        prog="vfiod serve",
        description="Hold the VFIO devices of one VM, and serve them.",
        epilog=SOCKETS,
        allow_abbrev=False,
        argument_default=None,
    )
    for setting in SERVE:
        add_to(parser, setting)
    return parser


def mdev_serve_parser() -> argparse.ArgumentParser:
    """The command line of ``vfiod mdev serve``."""
    parser = argparse.ArgumentParser(
        prog="vfiod mdev serve",
        description="Serve one mediated device by vfio-user; QEMU attaches with -device vfio-user-pci.",
        allow_abbrev=False,
    )
    door = parser.add_mutually_exclusive_group(required=True)
    for setting in MDEV_SERVE:
        more: dict[str, Any] = {"choices": setting.choices} if setting.choices else {}
        if setting.types == (int,):
            more["type"] = int
        if setting.many:
            more["default"] = []
        elif setting.standard:
            more["default"] = setting.standard
        add_to(door if setting.name in ("socket-path", "fd") else parser, setting, **more)
    return parser
