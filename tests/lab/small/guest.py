"""A Linux guest of one program, up in a second: what a device looks like from inside a hypervisor that got it.

The hypervisor is a QEMU that speaks vfio-user (``tests/lab/setup-vfio-user``), the kernel the lab's, the program
``init.c``, compiled when it is needed. Its findings come on the console, one line each.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.lab import qmp
from tests.lab.places import cache, find_kernel

SOURCE = Path(__file__).with_name("init.c")
#: Seconds until the guest has said what is waited for. Alone it takes two; nested in another guest a hundred.
WAIT_SECONDS = 120.0
PREFIX = "vfiod-guest: "
#: What the guest sees of a device that works: every line of init.c, in its order.
SEEN = ("found", "identity", "inverted", "msi", "intx", "dma")


def find_program() -> Path | None:
    """Return the QEMU that speaks vfio-user: ``VFIOD_LAB_QEMU_VFIO_USER``, or the one that was set up; or None."""
    named = os.environ.get("VFIOD_LAB_QEMU_VFIO_USER")
    path = Path(named) if named else cache() / "sid" / "qemu-vfio-user"
    return path if os.access(path, os.X_OK) else None


def unavailable_reason() -> str | None:
    """Return why no small guest can be started here, or None."""
    if find_program() is None:
        return "there is no QEMU that speaks vfio-user (run tests/lab/setup)"
    if find_kernel() is None:
        return "there is no lab kernel (run tests/lab/setup, which builds one)"
    missing = [name for name in ("gcc", "cpio", "gzip") if shutil.which(name) is None]
    return f"not installed: {', '.join(missing)} (run tests/lab/setup)" if missing else None


def build_initrd(directory: Path) -> Path:
    """Compile ``init.c`` and pack it; returns the initrd."""
    root = directory / "root"
    root.mkdir()
    warnings = ("-Wall", "-Wextra", "-Werror")
    subprocess.run(["gcc", "-static", "-O1", *warnings, "-o", root / "init", SOURCE], check=True)
    initrd = directory / "initrd"
    pack = f"echo init | cpio -o -H newc --quiet | gzip -1 >{initrd}"
    subprocess.run(["sh", "-c", pack], cwd=root, check=True)
    return initrd


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the guest."""

    ok: bool
    name: str
    detail: str


class SmallGuest:
    """One QEMU, from ``with`` to its end.

    Args:
        directory: for its sockets and its console; short, and its own.
        initrd: from :func:`build_initrd`.
        devices: ``-device`` arguments.
        then: ``poweroff``, ``reboot`` or ``wait``, when the program is done.
        rounds: how often a device is waited for; 0: it is there from the start.
        serial: the device is a serial card with so many ports.
        kernel: when not :func:`find_kernel`'s.

    """

    def __init__(
        self,
        directory: Path,
        initrd: Path,
        devices: Sequence[str],
        *,
        then: str = "poweroff",
        rounds: int = 0,
        serial: int = 0,
        kernel: Path | None = None,
    ) -> None:
        self.directory = directory
        self.console = directory / "console"
        self.qmp_path = directory / "qmp"
        program, kernel = find_program(), kernel or find_kernel()
        assert program is not None and kernel is not None, unavailable_reason()
        line = f"console=ttyS0 panic=-1 quiet vfiod.then={then}" + (f" vfiod.rounds={rounds}" if rounds else "")
        line += f" vfiod.serial={serial}" if serial else ""
        self.arguments = [
            *(str(program), "-accel", "tcg", "-machine", "q35,memory-backend=ram", "-m", "128"),
            *("-object", "memory-backend-memfd,id=ram,size=128M,share=on"),
            *("-nodefaults", "-display", "none", "-serial", f"file:{self.console}"),
            *("-qmp", f"unix:{self.qmp_path},server=on,wait=off"),
            *("-kernel", str(kernel), "-initrd", str(initrd), "-append", line),
            *(word for device in devices for word in ("-device", device)),
        ]
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.console.unlink(missing_ok=True)
        self.qmp_path.unlink(missing_ok=True)
        with (self.directory / "messages").open("wb") as messages:
            self.process = subprocess.Popen(
                self.arguments, stdin=subprocess.DEVNULL, stdout=messages, stderr=subprocess.STDOUT
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def kill(self) -> None:
        """End QEMU without a chance to say goodbye."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def monitor(self) -> contextlib.AbstractContextManager[qmp.Qmp]:
        """Open QEMU's own monitor, as soon as it is there."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not self._listens():
            assert time.monotonic() < deadline, self.tails()
            time.sleep(0.02)
        return qmp.connect(self.qmp_path, WAIT_SECONDS)

    def _listens(self) -> bool:
        """Whether QEMU has come as far as ``listen``: its socket is there a little earlier (proc_net_unix)."""
        # The flags of a listening socket have __SO_ACCEPTCON. To connect would take the monitor's one place.
        rows = (line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:])
        return any(row[-1] == str(self.qmp_path) and int(row[3], 16) & 0x10000 for row in rows)

    def findings(self) -> list[Finding]:
        """What the guest has seen so far."""
        found = []
        for line in self._lines():
            word, _, rest = line.partition(" ")
            if word in ("ok", "FAILED"):
                name, _, detail = rest.partition(" ")
                found.append(Finding(word == "ok", name, detail))
        return found

    def rounds_done(self) -> int:
        """How often the program has come to its end."""
        return sum(line.startswith("done ") for line in self._lines())

    def wait_done(self, rounds: int = 1, seconds: float = WAIT_SECONDS) -> list[Finding]:
        """Wait until the program has been done so often; fails with what was said when QEMU ends before."""
        deadline = time.monotonic() + seconds
        while self.rounds_done() < rounds:
            assert self.process is not None
            ended = self.process.poll()
            if self.rounds_done() >= rounds:
                break
            assert ended is None, f"QEMU ended with {ended}\n{self.tails()}"
            assert time.monotonic() < deadline, f"not within {seconds:.0f} s\n{self.tails()}"
            time.sleep(0.05)
        return self.findings()

    def wait_ended(self, seconds: float = WAIT_SECONDS) -> None:
        """Wait until QEMU has ended by itself."""
        assert self.process is not None
        assert self.process.wait(seconds) == 0, self.tails()

    def tails(self) -> str:
        """The last lines of the console and of what QEMU said."""
        texts = [f"--- {path.name} ---\n{_text(path)[-4000:]}" for path in (self.console, self.directory / "messages")]
        return "\n".join(texts)

    def _lines(self) -> list[str]:
        complete = _text(self.console).rpartition("\n")[0]
        return [line.strip()[len(PREFIX) :] for line in complete.splitlines() if line.startswith(PREFIX)]


def vfio_user(path: Path, **properties: object) -> str:
    """Return the ``-device`` argument that attaches to a vfio-user socket."""
    device = {"driver": "vfio-user-pci", "socket": {"type": "unix", "path": str(path)}, **properties}
    return json.dumps(device)


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return ""
