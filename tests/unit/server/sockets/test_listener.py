"""Listening sockets: modes, stale files, live servers, inherited fds. Real sockets in a real directory."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from vfiod.server.sockets.listener import PATH_BYTES, ListenError, SocketFile, inherit, open_path


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_only_its_owner_may_enter(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    old = os.umask(0)
    try:
        with open_path(str(path)):
            assert _mode(path) == 0o600
    finally:
        os.umask(old)


def test_with_a_group_the_group_may(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with open_path(str(path), os.getgid()):
        assert _mode(path) == 0o660
        assert path.lstat().st_gid == os.getgid()


def test_a_dead_servers_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    open_path(str(path)).close()
    with open_path(str(path)), socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(path))


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def test_a_live_servers_is_not(tmp_path: Path, kind: int) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX, kind) as other:
        other.bind(str(path))
        other.listen(1)
        with pytest.raises(ListenError, match="another program listens there"):
            open_path(str(path))
        with socket.socket(socket.AF_UNIX, kind) as peer:
            peer.connect(str(path))


def test_nor_when_its_queue_is_full(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen(0)
        with socket.socket(socket.AF_UNIX) as first:
            first.connect(str(path))
            with pytest.raises(ListenError, match="another program listens there"):
                open_path(str(path))


def test_what_is_no_socket_stays(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("precious")
    with pytest.raises(ListenError, match="exists and is not a socket"):
        open_path(str(path))
    assert path.read_text() == "precious"
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(ListenError, match="exists and is not a socket"):
        open_path(str(link))


def test_refusals_name_the_path(tmp_path: Path) -> None:
    with pytest.raises(ListenError, match="too long: at most 107 bytes"):
        open_path(str(tmp_path / ("x" * (PATH_BYTES + 1))))
    with pytest.raises(ListenError, match=r"Cannot listen on '.*/absent/socket': No such file or directory"):
        open_path(str(tmp_path / "absent" / "socket"))


def test_an_inherited_listening_socket_is_taken_over(tmp_path: Path) -> None:
    made = socket.socket(socket.AF_UNIX)
    made.bind(str(tmp_path / "socket"))
    made.listen()
    os.set_inheritable(made.fileno(), True)
    with inherit(made.detach()) as taken:
        assert not taken.get_inheritable()


def test_what_is_none_is_refused_and_left_alone(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as unbound:
        with pytest.raises(ListenError, match="is a socket that does not listen"):
            inherit(unbound.fileno())
        unbound.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)  # still open
    with socket.socket(socket.AF_INET) as inet, pytest.raises(ListenError, match="is no Unix stream socket"):
        inherit(inet.fileno())
    with (tmp_path / "file").open("w") as file, pytest.raises(ListenError, match="is no inherited socket"):
        inherit(file.fileno())
    with pytest.raises(ListenError, match="is no inherited socket: Bad file descriptor"):
        inherit(999_999)


def test_a_socket_file_is_removed_only_while_it_is_ours(tmp_path: Path) -> None:
    """Somebody else's file in its place stays; so does nothing at all."""
    path = tmp_path / "door"
    path.touch()
    ours = SocketFile(str(path))
    other = tmp_path / "other"
    other.touch()
    other.replace(path)
    ours.remove()
    assert path.exists()
    SocketFile(str(path)).remove()
    assert not path.exists()
    ours.remove()
