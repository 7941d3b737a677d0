"""Whom a server with a store of fds gives everything to: whom the keeper of the fds sees die, and can end."""

from __future__ import annotations

import pytest

from vfiod.server.state.format import VERSION
from vfiod.server.takeover.conversation import PROTOCOL, Hello
from vfiod.server.takeover.giver import _astray

UNIT = "/system.slice/system-vfiod.slice/vfiod@vm1.service"


def hello(unit: str, *, orphan: bool) -> Hello:
    return Hello(PROTOCOL, VERSION, "a test", unit=unit, orphan=orphan)


def test_an_orphan_in_the_unit_and_whoever_the_keeper_of_our_own_sees_are_followed() -> None:
    assert _astray(UNIT, hello(UNIT, orphan=True)) is None
    assert _astray(None, hello("", orphan=False)) is None


@pytest.mark.parametrize(
    ("unit", "theirs", "orphan", "what"),
    [
        (UNIT, UNIT, False, "has a parent that may stay"),
        (UNIT, "/user.slice", True, "is in the control group '/user.slice'"),
        (UNIT, "", True, "is in the control group ''"),
        ("", "", True, "is in the control group ''"),
    ],
)
def test_others_are_refused_and_told_what_to_do(unit: str, theirs: str, orphan: bool, what: str) -> None:
    said = _astray(unit, hello(theirs, orphan=orphan))
    assert said is not None
    assert what in said
    assert "ExecReload= of the unit, with --daemonize, and 'systemctl reload'" in said
