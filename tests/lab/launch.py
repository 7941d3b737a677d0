"""Boots a lab machine and runs one command in it as root, on the host's own files.

virtme-ng gives the guest the host's root file system over 9p, read-only, with overlays in the
guest's memory. So the guest runs the very interpreter, virtual environment and checkout that
the host runs; nothing is installed or copied. Results come back through one read/write
*exchange* directory, never through the console, which is kept for failures.

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
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.lab import qmp
from tests.lab.topologies import Topology

REPO = Path(__file__).resolve().parents[2]
#: This checkout, whichever one the virtual environment was installed from.
SOURCES = [str(REPO), *(str(REPO / root) for root in ("protocol", "server", "client"))]
#: Where the exchange directory stands inside the guest. ``/run`` is always the guest's own tmpfs.
GUEST_EXCHANGE = Path("/run/vfiod-lab")
#: The name of the virtio-serial port that is QEMU's second monitor, seen from inside.
QMP_PORT = "vfiod.qmp"
#: QEMU older than this lacks what the tests need of ``edu`` and ``intel-iommu``.
QEMU_MINIMUM = 10

#: Seconds until the guest's command must have begun. An idle machine needs 5; one whose cores
#: are taken by other guests needs many times that.
BOOT_SECONDS = float(os.environ.get("VFIOD_LAB_BOOT_SECONDS", "180"))
#: Seconds the whole guest may live, from QEMU's start.
TOTAL_SECONDS = float(os.environ.get("VFIOD_LAB_SECONDS", "900"))
#: Seconds between the end of the command and the end of QEMU: a kernel powering off.
POWEROFF_SECONDS = 30.0

#: How the guest mounts the host's files: virtme-ng's own options and a cache, which halves the time
#: Python takes to start. A guest lives for a minute; it need not see the host's later edits.
_ROOT_FLAGS = "rootflags=version=9p2000.L,trans=virtio,access=any,msize=500000,cache=loose"

#: Guest directories that virtme-ng covers with an empty tmpfs: what the tests need below them
#: (a checkout in /var/tmp, a build directory in /run) is mounted there once more.
_COVERED = ("/run", "/dev", "/proc", "/sys", "/var/tmp", "/var/log", "/var/cache")


class LabUnavailableError(RuntimeError):
    """The lab cannot run here; the message says what is missing and how to get it."""


class GuestDiedError(RuntimeError):
    """The guest did not boot, died, or ran out of time; the message ends with its console's last lines."""


def find_kernel() -> Path | None:
    """Return the kernel to boot: the environment's, the ready one beside the repository, the one built here."""
    lab = Path(os.environ.get("VFIOD_LAB") or REPO.parent / "shared" / "lab")
    cache = Path(os.environ.get("VFIOD_LAB_CACHE") or REPO / ".lab")
    named = os.environ.get("VFIOD_LAB_KERNEL")
    candidates = [Path(named)] if named else []
    candidates += [lab / "x86_64" / "bzImage", cache / "x86_64" / "bzImage"]
    return next((path for path in candidates if os.access(path, os.R_OK)), None)


def find_qemu() -> str | None:
    """Return the QEMU program: ``VFIOD_LAB_QEMU``, or the one on the path; None when there is none."""
    return shutil.which(os.environ.get("VFIOD_LAB_QEMU") or "qemu-system-x86_64")


def unavailable_reason() -> str | None:
    """Return why no lab machine can be started here, or None when one can."""
    program = find_qemu()
    if program is None:
        return "qemu-system-x86_64 is not installed (run tests/lab/setup)"
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    words = version.split()
    number = words[3] if len(words) > 3 else "unknown"
    major = number.partition(".")[0]
    if not major.isdigit() or int(major) < QEMU_MINIMUM:
        return f"QEMU {number} is too old, {QEMU_MINIMUM}.0 is needed (run tests/lab/setup)"
    if find_kernel() is None:
        return "there is no lab kernel (run tests/lab/setup, which builds one)"
    if _find_vng() is None:
        return "virtme-ng is not installed beside this Python (the project's dependency group 'lab')"
    return None


def _find_vng() -> Path | None:
    path = Path(sys.prefix) / "bin" / "vng"
    return path if path.exists() else None


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
        reason = unavailable_reason()
        if reason is not None:
            raise LabUnavailableError(reason)
        write_start_script(self.exchange, self.command, self.environment, self.total_seconds)
        line = vng_command(self.topology, self.directory, ["--", f"exec /bin/sh {GUEST_EXCHANGE}/start"])
        master, slave = pty.openpty()
        try:
            # virtme-ng wants a terminal. ``setsid --ctty`` makes ours the controlling one of a
            # session that holds virtme-ng, its shell and QEMU: one process group to kill, and
            # the kernel hangs it up when this process dies without a chance to.
            self._process = subprocess.Popen(
                ["setsid", "--ctty", *line],
                stdin=slave,
                stdout=slave,
                stderr=slave,
                env=vng_environment(self.directory),
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


# -- how virtme-ng is called ----------------------------------------------------------------


def vng_environment(directory: Path) -> dict[str, str]:
    """Return virtme-ng's environment: it finds its other half on the path, and leaves nothing behind.

    Its caches, its temporary files and its user configuration all come from HOME and TMPDIR; a
    lab that obeyed a user's configuration would not be the same machine everywhere.
    """
    path = f"{Path(sys.prefix) / 'bin'}:{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    return {**os.environ, "PATH": path, "HOME": str(directory), "TMPDIR": str(directory)}


def vng_command(topology: Topology, directory: Path, rest: Sequence[str]) -> list[str]:
    """Return the command line that boots ``topology`` with ``directory`` for its files.

    ``rest`` ends it: what to run. Kernel and monitor go by their names in ``directory``, because
    virtme-ng hands its arguments through a shell, unquoted.
    """
    vng, kernel, qemu = _find_vng(), find_kernel(), find_qemu()
    if vng is None or kernel is None or qemu is None:
        raise LabUnavailableError(unavailable_reason() or "QEMU, virtme-ng or the kernel went away")
    link = directory / "bzImage"
    link.unlink(missing_ok=True)
    link.symlink_to(kernel.resolve())
    extra = [
        *("-cpu", topology.cpu),
        *topology.qemu_arguments(),
        *("-chardev", f"socket,id=lab-qmp,path={directory / 'qmp'},server=on,wait=off"),
        *("-mon", "chardev=lab-qmp,mode=control"),
        # QEMU's second monitor ends in a serial port of its own guest. A monitor and a port are
        # both front ends, so a socket joins them.
        *("-chardev", f"socket,id=lab-qmp2,path={directory / 'qmp2'},server=on,wait=off"),
        *("-mon", "chardev=lab-qmp2,mode=control"),
        *("-chardev", f"socket,id=lab-port,path={directory / 'qmp2'}"),
        *("-device", "virtio-serial-pci,id=lab-serial"),
        *("-device", f"virtserialport,bus=lab-serial.0,chardev=lab-port,name={QMP_PORT}"),
    ]
    line = [sys.executable, str(vng), "--verbose", "--disable-kvm", "--disable-microvm", "--force-9p"]
    line += ["--run", str(link), "--cpus", str(topology.cpus), "--memory", topology.memory]
    line += ["--qemu", qemu, "--user", "root"]
    for argument in (_ROOT_FLAGS, *topology.kernel_arguments):
        line += ["--append", argument]
    line += ["--rwdir", f"{GUEST_EXCHANGE}={directory / 'exchange'}"]
    for path in needed_trees():
        if any(path.is_relative_to(covered) for covered in _COVERED):
            line += ["--rodir", str(path)]
    return [*line, f"--qemu-opts={shlex.join(extra)}", *rest]


def needed_trees() -> list[Path]:
    """Return what a test in the guest reads: the checkout, the virtual environment, the interpreter."""
    trees = [REPO, Path(sys.prefix), Path(sys.base_prefix), Path(sys.executable).resolve().parent.parent]
    return list(dict.fromkeys(trees))


def write_start_script(exchange: Path, command: str, environment: Mapping[str, str], total_seconds: float) -> None:
    """Write what the guest runs first, and the list of what it must open to unprivileged processes."""
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in environment.items())
    closed = closed_paths(needed_trees())
    lines = [f"dir {path}\n" for path in closed.passages] + [f"tree {path}\n" for path in closed.trees]
    (exchange / "closed").write_text("".join(lines))
    (exchange / "closed.entries").write_text("".join(f"{path}\0" for path in closed.entries))
    # The guest's own time limit is the last resort: should every process on the host that knows
    # this guest be gone, it still ends.
    limit = int(total_seconds) + 60
    (exchange / "start").write_text(
        f"""#!/bin/sh
exec </dev/null >{GUEST_EXCHANGE}/output 2>&1
echo yes >{GUEST_EXCHANGE}/booted
/bin/sh {shlex.quote(str(REPO / "tests/lab/guest/open-paths"))} {GUEST_EXCHANGE}/closed
cd {shlex.quote(str(REPO))} || exit 1
export PATH={shlex.quote(str(Path(sys.prefix) / "bin"))}:/usr/sbin:/usr/bin:/sbin:/bin
export HOME=/run/home PYTHONPATH={shlex.quote(os.pathsep.join(SOURCES))}
mkdir -p /run/home
{exports}
timeout --signal=KILL {limit} /bin/sh -c {shlex.quote(command)}
echo $? >{GUEST_EXCHANGE}/status.new
mv {GUEST_EXCHANGE}/status.new {GUEST_EXCHANGE}/status
"""
    )


@dataclass(frozen=True, slots=True)
class ClosedPaths:
    """What keeps an unprivileged process from reading some trees."""

    #: Directories that others may not pass, outermost first.
    passages: tuple[Path, ...]
    #: Those trees that have closed entries, and the entries: files and directories others may not read.
    trees: tuple[Path, ...]
    entries: tuple[Path, ...]


def closed_paths(trees: Iterable[Path]) -> ClosedPaths:
    """Return what keeps an unprivileged process out of ``trees``, for ``guest/open-paths`` to open.

    A checkout or an interpreter often lies in a home directory of mode 0700, or was written
    under umask 077. The guest opens exactly these paths, in overlays in its own memory; the
    host's modes stay as they are. Looked for here, where a walk takes a tenth of a second.
    """
    passages: set[Path] = set()
    closed: dict[Path, list[Path]] = {}
    for tree in trees:
        # A path given through symbolic links needs the directories of both spellings.
        for spelling in (tree, tree.resolve()):
            passages.update(path for path in (spelling, *spelling.parents) if not path.stat().st_mode & stat.S_IXOTH)
        real = tree.resolve()
        if not real.is_relative_to("/usr") and (entries := list(_closed_entries(real))):
            closed[real] = entries
    every = [path for entries in closed.values() for path in entries]
    return ClosedPaths(tuple(sorted(passages)), tuple(closed), tuple(dict.fromkeys(every)))


#: Never read by an unprivileged process, and worth the time they would take: in a tree written
#: under umask 077 every entry is closed, and opening one copies it into the guest's memory.
_NOT_NEEDED = {".git", ".lab", ".venv", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis"}
_NOT_NEEDED_IN_VENV = {"mypy", "mypyc", "pip", "ruff"}


def _closed_entries(tree: Path) -> Iterable[Path]:
    unneeded = _NOT_NEEDED if tree == REPO else _NOT_NEEDED | _NOT_NEEDED_IN_VENV
    if not tree.stat().st_mode & stat.S_IROTH:
        yield tree
    for directory, names, files in os.walk(tree):
        names[:] = [name for name in names if name not in unneeded]
        for name in [*names, *files]:
            path = Path(directory, name)
            with contextlib.suppress(OSError):
                mode = path.lstat().st_mode
                wanted = stat.S_IROTH | (stat.S_IXOTH if stat.S_ISDIR(mode) else 0)
                if not stat.S_ISLNK(mode) and mode & wanted != wanted and name not in unneeded:
                    yield path
