"""Roles: what the sessions of a socket may do.

A role is a set of commands. ``operator`` has all and is the default; ``observer`` has those that change nothing. Others
are made by ``--role NAME=PATTERN,...`` of shell patterns over command names; ``@observer`` stands for that role's
commands. What a role may not do is refused by name, before its arguments are looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Final

from vfiod.protocol.catalogue import COMMANDS
from vfiod.protocol.errors import PermissionRefused, VfiodError

__all__ = ["OBSERVER", "OPERATOR", "THROUGH_OTHERS", "Role", "RoleError", "build_roles"]

OPERATOR: Final = "operator"
OBSERVER: Final = "observer"

ALWAYS: Final = frozenset({"qmp_capabilities"})
"""Without these no QMP session comes to anything."""

THROUGH_OTHERS: Final = frozenset({"human-monitor-command"})
"""Runs other commands, and asks the role again for each: harmless in every role. In the audit log is what it runs."""

SHOWN: Final = 8
"""Commands that a refusal names; ``query-commands`` lists them all."""


class RoleError(VfiodError):
    """A role cannot be made as asked."""


class Role:
    """A name, and the commands that go with it.

    Attributes:
        name: as in ``,role=NAME``.
        commands: what it may run.

    """

    __slots__ = ("commands", "name")

    def __init__(self, name: str, commands: Iterable[str]) -> None:
        self.name: Final = name
        self.commands: Final = frozenset(commands) | ALWAYS

    def refusal(self, command: str) -> PermissionRefused:
        """What a session hears that asks for more."""
        may = sorted(self.commands - ALWAYS)
        more = f" and {len(may) - SHOWN} others (query-commands)" if len(may) > SHOWN else ""
        return PermissionRefused(
            f"This socket has the role '{self.name}', which may not run {command}; it may run "
            f"{', '.join(may[:SHOWN]) or 'nothing'}{more}"
        )


def _observed() -> frozenset[str]:
    return frozenset(name for name, spec in COMMANDS.items() if not spec.mutates) | THROUGH_OTHERS


def build_roles(given: Mapping[str, Iterable[str]]) -> dict[str, Role]:
    """The two roles that are always there, and those of ``--role``.

    Args:
        given: patterns by name.

    Raises:
        RoleError: a name that is taken, or a pattern that matches no command.

    """
    roles = {OPERATOR: Role(OPERATOR, COMMANDS), OBSERVER: Role(OBSERVER, _observed())}
    for name, patterns in given.items():
        if name in roles:
            raise RoleError(f"The role '{name}' is built in: give yours another name")
        commands: set[str] = set()
        for pattern in patterns:
            found = _observed() if pattern == f"@{OBSERVER}" else {one for one in COMMANDS if fnmatchcase(one, pattern)}
            if not found:
                raise RoleError(f"The role '{name}': '{pattern}' matches no command; vfiod call PATH query-commands")
            commands |= found
        roles[name] = Role(name, commands)
    return roles
