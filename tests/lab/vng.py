"""The x86_64 machines: booted by virtme-ng, on the host's own files.

virtme-ng gives the guest the host's root file system over 9p, read-only, with overlays in the
guest's memory. So the guest runs the very interpreter, virtual environment and checkout that
the host runs; nothing is installed or copied. Results come back through one read/write
*exchange* directory, never through the console, which is kept for failures.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.lab.places import GUEST_EXCHANGE, QEMU_MINIMUM, REPO, LabUnavailableError, find_kernel
from tests.lab.topologies import Topology

#: The name of the virtio-serial port that is QEMU's second monitor; ``guest/machine.py`` looks for it.
QMP_PORT = "vfiod.qmp"

#: How the guest mounts the host's files: virtme-ng's own options and a cache, which halves the time
#: Python takes to start. A guest lives for a minute; it need not see the host's later edits.
_ROOT_FLAGS = "rootflags=version=9p2000.L,trans=virtio,access=any,msize=500000,cache=loose"

#: Ticks that come by themselves, on every processor. Otherwise Linux asks the local APIC for each next one, since 7.0
#: from a place of its own after the interrupt (``HRTIMER_REARM_DEFERRED``), and in emulation that is missed now and
#: then: all processors halt, the APIC's count at zero and its interrupt neither pending nor in service, for ever.
_TICKS = ("nohz=off", "highres=off")

#: Guest directories that virtme-ng covers with an empty tmpfs: what the tests need below them (a checkout in /var/tmp,
#: a build directory in /run) is bound there, from below the tmpfs. Not by virtme-ng's own ``--rodir``: that mounts 9p
#: without a cache, which makes a new inode at each look, and then no rule of Landlock holds for a directory.
_COVERED = ("/run", "/dev", "/proc", "/sys", "/var/tmp", "/var/log", "/var/cache")


def find_qemu() -> str | None:
    """Return the QEMU program: ``VFIOD_LAB_QEMU``, or the one on the path; None when there is none."""
    return shutil.which(os.environ.get("VFIOD_LAB_QEMU") or "qemu-system-x86_64")


def unavailable_reason() -> str | None:
    """Return why no x86_64 machine can be started here, or None when one can."""
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


def prepare(topology: Topology, directory: Path) -> str:
    """Write down what the guest must open to unprivileged processes; return the commands that open it."""
    exchange = directory / "exchange"
    closed = closed_paths(needed_trees())
    lines = [f"dir {path}\n" for path in closed.passages] + [f"tree {path}\n" for path in closed.trees]
    (exchange / "closed").write_text("".join(lines))
    (exchange / "closed.entries").write_text("".join(f"{path}\0" for path in closed.entries))
    opener = shlex.quote(str(REPO / "tests/lab/guest/open-paths"))
    return bind_covered() + (
        f"/bin/sh {opener} {GUEST_EXCHANGE}/closed\n"
        f"export PATH={shlex.quote(str(Path(sys.prefix) / 'bin'))}:/usr/sbin:/usr/bin:/sbin:/bin"
    )


def command_line(topology: Topology, directory: Path) -> list[str]:
    """Return the command line that boots ``topology`` and runs the exchange directory's ``start``."""
    return vng_command(topology, directory, ["--", f"exec /bin/sh {GUEST_EXCHANGE}/start"])


def environment(directory: Path) -> dict[str, str]:
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
    clock = [f"tsc_early_khz={host_clock_khz()}"] if topology.tell_clock else []
    for argument in (_ROOT_FLAGS, *_TICKS, *topology.kernel_arguments, *clock):
        line += ["--append", argument]
    line += ["--rwdir", f"{GUEST_EXCHANGE}={directory / 'exchange'}"]
    return [*line, f"--qemu-opts={shlex.join(extra)}", *rest]


def bind_covered() -> str:
    """Return the commands that show what virtme-ng's tmpfs hide of what is needed, if they hide any."""
    hidden = [path for path in needed_trees() if any(path.is_relative_to(covered) for covered in _COVERED)]
    if not hidden:
        return ""
    lines = ["mkdir -p /run/vfiod-root && mount --bind / /run/vfiod-root"]
    for path in hidden:
        place = shlex.quote(str(path))
        lines.append(f"mkdir -p {place} && mount --bind /run/vfiod-root{place} {place}")
    return "".join(f"{line}\n" for line in lines)


def host_clock_khz() -> int:
    """Return how fast this machine's time stamp counter runs, in kHz: an emulated one of x86 counts with it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("cpu MHz"):
            return int(float(line.partition(":")[2]) * 1000)
    return 1_000_000  # on another architecture QEMU's counts nanoseconds


def needed_trees() -> list[Path]:
    """Return what a test in the guest reads: the checkout, the virtual environment, the interpreter."""
    trees = [REPO, Path(sys.prefix), Path(sys.base_prefix), Path(sys.executable).resolve().parent.parent]
    return list(dict.fromkeys(trees))


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
