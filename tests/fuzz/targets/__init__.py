"""The table of all targets: every door through which bytes come from somebody else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from tests.fuzz.target import Target
from tests.fuzz.targets import bus, chains, channels, config_space, configuration, monitor, states, vfio_user

__all__ = ["TARGETS"]

_PARTS = (monitor, bus, vfio_user, chains, config_space, channels, configuration, states)

TARGETS: Final[Mapping[str, Target]] = {one.name: one for part in _PARTS for one in part.TARGETS}
"""Every target, by its name."""
