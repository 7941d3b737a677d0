"""Boots a lab machine and runs one command in it as root, with the project's sources and interpreter.

How a machine boots and how its results come back depends on its kind (``vng.py`` for x86_64,
``s390x.py`` for s390x). The rest is the same for all, and here: time limits, the console kept for
failures, an exchange directory with the command's output and status, and that QEMU always ends.

Why emulation: ``/dev/kvm`` of a build machine can seldom run guests, and the tests need a real
kernel with an IOMMU, not speed.
"""

from __future__ import annotations

import contextlib
import os
import pty
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from tests.lab import qmp, relay, s390x, vng
from tests.lab.places import GUEST_EXCHANGE, REPO, SOURCES, GuestDiedError, LabUnavailableError
from tests.lab.topologies import EDU, Topology

#: Seconds until the guest's command must have begun. An idle machine needs 5; one whose cores
#: are taken by other guests needs many times that.
BOOT_SECONDS = float(os.environ.get("VFIOD_LAB_BOOT_SECONDS", "300"))
#: Seconds the whole guest may live, from QEMU's start.
TOTAL_SECONDS = float(os.environ.get("VFIOD_LAB_SECONDS", "2400"))
#: Seconds between the end of the command and the end of QEMU: a kernel powering off.
POWEROFF_SECONDS = 30.0


class Kind(Protocol):
    """How one kind of machine boots: the modules ``vng`` and ``s390x`` are two."""

    def unavailable_reason(self) -> str | None:
        """Return why no such machine can be started here, or None when one can."""
        ...

    def prepare(self, topology: Topology, directory: Path) -> str:
        """Write what the guest needs into ``directory``; return the shell commands it begins with."""
        ...

    def command_line(self, topology: Topology, directory: Path) -> list[str]:
        """Return the command that boots the machine, in a terminal that gets its console."""
        ...

    def environment(self, directory: Path) -> dict[str, str]:
        """Return that command's environment."""
        ...


KINDS: Mapping[str, Kind] = {"x86_64": vng, "s390x": s390x}


def unavailable_reason(topology: Topology = EDU) -> str | None:
    """Return why this machine cannot be started here, or None when it can."""
    return KINDS[topology.architecture].unavailable_reason()


class Guest:
    """One running machine, from ``start`` to ``close``; a context manager does both.

    ``command`` is a shell command line, run by root in the guest with the repository as its
    directory. ``environment`` is added to what it sees. The files:

    - ``exchange``: read/write on both sides, ``GUEST_EXCHANGE`` inside. The command's output is
      in ``output`` there, its exit status in ``status`` once it ended.
    - ``console``: everything the kernel and QEMU said.
    - ``qmp_path``: QEMU's monitor.
    """

    def __init__(
        self,
        topology: Topology,
        command: str,
        *,
        environment: Mapping[str, str] | None = None,
        boot_seconds: float = BOOT_SECONDS,
        total_seconds: float = TOTAL_SECONDS,
    ) -> None:
        self.topology = topology
        self.command = command
        self.environment = dict(environment or {})
        self.boot_seconds = boot_seconds
        self.total_seconds = total_seconds
        # Short and flat: a Unix socket's path may have 107 bytes.
        self.directory = Path(tempfile.mkdtemp(prefix="vfiod-lab-"))
        self.exchange = self.directory / "exchange"
        self.exchange.mkdir()
        self.console = self.directory / "console"
        self.qmp_path = self.directory / "qmp"
        self._process: subprocess.Popen[bytes] | None = None
        self._copier: threading.Thread | None = None
        self._relay: relay.Host | None = None
        self._kind = KINDS[topology.architecture]
        self._started = 0.0

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- life ---------------------------------------------------------------------------

    def start(self) -> None:
        """Start QEMU; returns at once. LabUnavailableError when it cannot be."""
        reason = self._kind.unavailable_reason()
        if reason is not None:
            raise LabUnavailableError(reason)
        beginning = self._kind.prepare(self.topology, self.directory)
        write_start_script(self.exchange, self.command, self.environment, self.total_seconds, beginning)
        line = self._kind.command_line(self.topology, self.directory)
        if self.topology.relayed:
            self._relay = relay.Host(self.directory, self.exchange)
        master, slave = pty.openpty()
        try:
            # virtme-ng wants a terminal. ``setsid --ctty`` makes ours the controlling one of a
            # session that holds whatever starts QEMU, and QEMU: one process group to kill, and
            # the kernel hangs it up when this process dies without a chance to.
            self._process = subprocess.Popen(
                ["setsid", "--ctty", *line],
                stdin=slave,
                stdout=slave,
                stderr=slave,
                env=self._kind.environment(self.directory),
                cwd=self.directory,
            )
        except BaseException:
            os.close(master)
            raise
        finally:
            os.close(slave)
        self._started = time.monotonic()
        self._copier = threading.Thread(target=self._copy_console, args=(master,), name="lab-console", daemon=True)
        self._copier.start()

    def _copy_console(self, master: int) -> None:
        # A thread, for a console nobody reads fills up, and then QEMU stands still.
        with self.console.open("wb", buffering=0) as console:
            try:
                while data := os.read(master, 65536):
                    console.write(data)
            except OSError:
                pass  # EIO: the last process of the session has ended
            finally:
                os.close(master)

    @property
    def booted(self) -> bool:
        """Whether the command has begun."""
        return (self.exchange / "booted").exists()

    @property
    def status(self) -> int | None:
        """The command's exit status, or None while it has none."""
        try:
            return int((self.exchange / "status").read_text())
        except (FileNotFoundError, ValueError):
            return None

    def check(self) -> bool:
        """Return whether the command still runs; GuestDiedError when it never will end.

        Call it while waiting for anything the guest is to do: this is where the time limits act.
        """
        if self._process is None:
            raise GuestDiedError("the guest was not started")
        # The order matters: a guest that wrote its status and went between two looks is no failure.
        ended = self._process.poll() is not None
        if ended and self._relay is not None:
            self._relay.join()  # what was on its way when QEMU ended counts
        if self.status is not None:
            return False
        if ended:
            what = "died" if self.booted else "did not boot"
            raise GuestDiedError(f"the guest {what}: QEMU ended with {self._process.returncode}\n{self.tails()}")
        age = time.monotonic() - self._started
        if not self.booted and age > self.boot_seconds:
            raise GuestDiedError(f"the guest did not boot within {self.boot_seconds:.0f} s\n{self.tails()}")
        if age > self.total_seconds:
            raise GuestDiedError(f"the guest did not end within {self.total_seconds:.0f} s\n{self.tails()}")
        return True

    def wait(self) -> int:
        """Wait for the command's end and return its exit status; GuestDiedError when there is none."""
        while self.check():
            time.sleep(0.1)
        status = self.status
        assert status is not None
        return status

    def close(self) -> None:
        """End QEMU whatever it does, and remove the guest's files. Safe to repeat."""
        process, self._process = self._process, None
        if process is not None:
            if self.status is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POWEROFF_SECONDS)
            # The group outlives its leader: virtme-ng may be gone while QEMU is not.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if self._relay is not None:
            self._relay.close()
            self._relay = None
        if self._copier is not None:
            self._copier.join(10)
            self._copier = None
        if os.environ.get("VFIOD_LAB_KEEP"):
            print(f"lab: kept {self.directory}", file=sys.stderr)
        else:
            shutil.rmtree(self.directory, ignore_errors=True)

    # -- what can be asked --------------------------------------------------------------

    def qmp(self, timeout: float = 30.0) -> contextlib.AbstractContextManager[qmp.Qmp]:
        """Open QEMU's monitor, from the host. One session at a time."""
        return qmp.connect(self.qmp_path, timeout)

    def output(self) -> str:
        """Return what the command has written so far."""
        return _read_text(self.exchange / "output")

    def tails(self, lines: int = 40) -> str:
        """Return the last lines of the command's output and of the console."""
        text = ""
        for title, path in (("output", self.exchange / "output"), ("console", self.console)):
            tail = [line.rstrip() for line in _read_text(path).splitlines() if line.strip()][-lines:]
            text += f"--- the guest's {title}, last lines ---\n" + "\n".join(tail) + "\n"
        return text


def _read_text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return ""


def write_start_script(
    exchange: Path, command: str, environment: Mapping[str, str], total_seconds: float, beginning: str
) -> None:
    """Write what the guest runs first. ``beginning`` is what its kind needs done, the path among it."""
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in environment.items())
    # The guest's own time limit is the last resort: should every process on the host that knows
    # this guest be gone, it still ends.
    limit = int(total_seconds) + 60
    (exchange / "start").write_text(
        f"""#!/bin/sh
exec </dev/null >{GUEST_EXCHANGE}/output 2>&1
echo yes >{GUEST_EXCHANGE}/booted
{beginning}
cd {shlex.quote(str(REPO))} || exit 1
export HOME=/run/home PYTHONPATH={shlex.quote(os.pathsep.join(SOURCES))}
mkdir -p /run/home
{exports}
timeout -s KILL {limit} /bin/sh -c {shlex.quote(command)}
echo $? >{GUEST_EXCHANGE}/status.new
mv {GUEST_EXCHANGE}/status.new {GUEST_EXCHANGE}/status
"""
    )
