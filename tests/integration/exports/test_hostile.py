"""Clients that send what they must not, and clients that die. The server stays in step, and nothing leaks."""

from __future__ import annotations

import pytest

from vfiod.protocol import vfio_user

from .hypervisor import Hypervisor, Refused


def refuses(errno: str, hypervisor: Hypervisor, payload: vfio_user.Payload, fds: tuple[int, ...] = ()) -> None:
    with pytest.raises(Refused, match=f"^{errno}$"):
        hypervisor.do(payload, fds)
