"""What a guest test can ask of the machine it runs in: QEMU's own monitor, and processes without rights."""

from __future__ import annotations

import functools
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from tests.lab.places import GUEST_EXCHANGE, REPO
from tests.lab.qmp import Qmp

#: QEMU's second monitor, seen from inside: a virtio-serial port (``vng.QMP_PORT``), or a stream
#: (``s390x.MONITOR``).
QMP_PORT = "vfiod.qmp"
MONITOR = "guest-qmp"

#: Who unprivileged processes run as; nobody in the host's files has these numbers.
UNPRIVILEGED_UID = UNPRIVILEGED_GID = 1000
#: The project's source roots, for a child that must not depend on how the project was installed.
SOURCE_ROOTS = tuple(str(REPO / root) for root in ("protocol", "server", "client"))


@functools.cache
def qemu() -> Qmp:
    """Return the one session with QEMU's monitor: ``qemu().execute("device_del", id="edu-port")``."""
    if (GUEST_EXCHANGE / MONITOR).exists():
        connection = stream(MONITOR)
        connection.settimeout(60)
        _kept.append((connection.makefile("rb"), connection.makefile("wb")))
        return Qmp(*_kept[-1])
    for port in Path("/sys/class/virtio-ports").iterdir():
        if (port / "name").read_text().strip() == QMP_PORT:
            descriptor = os.open(f"/dev/{port.name}", os.O_RDWR)
            # Both files live until the process ends, as the port does: it can be opened once.
            reader: IO[bytes] = os.fdopen(descriptor, "rb")
            writer: IO[bytes] = os.fdopen(os.dup(descriptor), "wb", buffering=0)
            _kept.append((reader, writer))
            return Qmp(reader, writer)
    raise FileNotFoundError(f"no virtio-serial port is called {QMP_PORT}")


def stream(name: str) -> socket.socket:
    """Connect to one of the machine's ``streams``: QEMU's end of a character device. Close it to hang up."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(str(GUEST_EXCHANGE / name))
    return connection


_kept: list[tuple[IO[bytes], IO[bytes]]] = []


def unprivileged(
    arguments: Sequence[str],
    *,
    uid: int = UNPRIVILEGED_UID,
    gid: int = UNPRIVILEGED_GID,
    memlock: int | None = None,
    environment: Mapping[str, str] | None = None,
    **options: Any,
) -> subprocess.Popen[Any]:
    """Start ``arguments`` as ``uid``, with no capability and no way to get one.

    ``memlock`` is its RLIMIT_MEMLOCK in bytes, hard and soft. Its environment is small and new:
    the project's source roots are on its Python path; ``environment`` is added. ``options`` go
    to Popen (``pass_fds``, ``stdout`` ...). Its HOME and working directory are /tmp.
    """
    line: list[str] = []
    if memlock is not None:
        line += ["prlimit", f"--memlock={memlock}:{memlock}"]
    line += ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups"]
    line += ["--inh-caps=-all", "--bounding-set=-all", "--no-new-privs", "--"]
    options.setdefault("cwd", "/tmp")
    return subprocess.Popen(
        [*line, *arguments],
        env={
            "PATH": os.environ["PATH"],
            "HOME": "/tmp",
            "PYTHONPATH": os.pathsep.join(SOURCE_ROOTS),
            **(environment or {}),
        },
        **options,
    )


def unprivileged_python(code: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run ``python -c code`` unprivileged and return what it wrote; it inherits the test's interpreter."""
    process = unprivileged(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )
    with process:
        out, error = process.communicate(timeout=100)
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)
