"""Who may come in."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from vfiod.server.sockets.access import DEFAULT_OVERFLOW_UID, Access, Peer, overflow_uid, peer_of


def test_the_kernel_says_who_connected() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert peer_of(ours) == Peer(os.getpid(), os.geteuid())


@pytest.mark.parametrize(
    ("uid", "comes_in"), [(0, True), (1000, True), (1001, False), (2000, True), (65534, False), (4294967295, False)]
)
def test_root_ourselves_and_the_allowed_alone(uid: int, comes_in: bool) -> None:
    access = Access(frozenset({2000, 65534}), own=1000, overflow=65534)
    refusal = access.refusal(Peer(1, uid))
    assert (refusal is None) == comes_in
    if refusal is not None:
        assert refusal == (f"User {uid} may not use this monitor: start the server with --allow-uid {uid} to allow it")


def test_the_overflow_uid_is_the_kernels(tmp_path: Path) -> None:
    assert overflow_uid() == int(Path("/proc/sys/kernel/overflowuid").read_text())
    assert overflow_uid(tmp_path / "absent") == DEFAULT_OVERFLOW_UID
