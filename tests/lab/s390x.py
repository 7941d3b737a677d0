"""The s390x machines: QEMU with an initial RAM disk, for the only processor that has channel I/O.

Nothing of the host can be shared here: its programs are for another processor, and the kernel has
no 9p. So the guest gets everything in its memory: Debian's Python for s390x (``build-root`` makes
that once), and over it, made anew for each boot, the checkout, the pure Python packages of this
virtual environment, and their bytecode. What comes back comes over a console (``relay.py``).
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.lab import relay
from tests.lab.places import GUEST_EXCHANGE, QEMU_MINIMUM, REPO, LabUnavailableError, cache, find_kernel
from tests.lab.topologies import Topology

#: What of this virtual environment goes into the guest, with all it depends on.
PACKAGES = ("pytest", "jsonrpcserver")
#: Not needed there, or there already, as Debian's packages: some have parts in Rust.
LEFT_OUT = {"hypothesis", "jsonschema", "msgspec", "msgpack", "pyzmq"}
#: What stays of pygments, which pytest colours tracebacks with: every file is a piece of the guest's memory.
LEXERS = {"__init__", "_mapping", "diff", "python", "special"}
#: What of the checkout goes into the guest.
TREES = ("protocol", "server", "client", "tests", "examples", "docs")
FILES = ("pyproject.toml", "README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")
#: The stream that is QEMU's second monitor, for guest tests.
MONITOR = "guest-qmp"
_DIST_PACKAGES = Path("usr/lib/python3/dist-packages")


def find_qemu() -> str | None:
    """Return the QEMU program: ``VFIOD_LAB_QEMU_S390X``, or the one on the path; None when there is none."""
    return shutil.which(os.environ.get("VFIOD_LAB_QEMU_S390X") or "qemu-system-s390x")


def root_archive() -> Path:
    """Return where ``build-root`` puts the guest's user space."""
    return cache() / "s390x" / "root.cpio"


def unavailable_reason() -> str | None:
    """Return why no s390x machine can be started here, or None when one can."""
    program = find_qemu()
    if program is None:
        return "qemu-system-s390x is not installed (run tests/lab/setup)"
    words = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout.split()
    number = words[3] if len(words) > 3 else "unknown"
    major = number.partition(".")[0]
    if not major.isdigit() or int(major) < QEMU_MINIMUM:
        return f"QEMU {number} is too old, {QEMU_MINIMUM}.0 is needed (run tests/lab/setup)"
    if find_kernel("s390x") is None:
        return "there is no s390x lab kernel (run tests/lab/setup, which builds one)"
    if not root_archive().exists() or shutil.which("cpio") is None:
        return "there is no s390x user space (run tests/lab/setup, which makes one)"
    return None


def prepare(topology: Topology, directory: Path) -> str:
    """Have what the guest runs on at hand; return what its start script begins with."""
    # The socket names of the streams are files of the exchange directory, in the guest only.
    (directory / "exchange" / "streams").write_text("\n".join([MONITOR, *topology.streams]))
    shutil.copyfile(Path(relay.__file__), directory / "exchange" / "relay.py")
    return "export PATH=/usr/bin"


def command_line(topology: Topology, directory: Path) -> list[str]:
    """Return QEMU's command line; writes the RAM disk it names."""
    qemu, kernel = find_qemu(), find_kernel("s390x")
    if qemu is None or kernel is None:
        raise LabUnavailableError(unavailable_reason() or "QEMU or the kernel went away")
    write_initrd(directory / "initrd", directory / "exchange", directory / "last")
    line = [qemu, "-accel", "tcg", "-cpu", topology.cpu, "-m", topology.memory, "-smp", str(topology.cpus)]
    line += ["-nodefaults", "-display", "none", "-no-reboot"]
    # The first console, for the kernel and people, is this terminal. QEMU's interrupt key is not.
    line += ["-chardev", "stdio,id=lab-console,signal=off", "-device", "sclplmconsole,chardev=lab-console"]
    # The second carries what relay.py says. QEMU connects to us, so that nothing is lost.
    line += ["-chardev", f"socket,id=lab-relay,path={directory / relay.CONSOLE_NAME}"]
    line += ["-device", "sclpconsole,chardev=lab-relay"]
    for name, path in (("lab-qmp", "qmp"), ("lab-qmp2", MONITOR)):
        line += ["-chardev", f"socket,id={name},path={directory / path},server=on,wait=off"]
        line += ["-mon", f"chardev={name},mode=control"]
    for name in topology.streams:
        line += ["-chardev", f"socket,id={name},path={directory / name},server=on,wait=off"]
    line += topology.qemu_arguments()
    # A kernel that oopsed may spin for ever; this one ends, with the reason on its console.
    arguments = ["console=ttyS0", "panic=-1", "oops=panic", *topology.kernel_arguments]
    return [*line, "-kernel", str(kernel), "-initrd", str(directory / "initrd"), "-append", " ".join(arguments)]


def environment(directory: Path) -> dict[str, str]:
    """Return QEMU's environment: this one."""
    return dict(os.environ)


# -- the RAM disk -----------------------------------------------------------------------------


def write_initrd(target: Path, exchange: Path, last: Path) -> None:
    """Write the guest's root: Debian's part, the checkout's, and what is this boot's alone.

    The kernel unpacks archives that follow one another, later files over earlier ones. None is
    compressed: QEMU copies faster than emulated code unpacks.
    """
    with _locked():
        layer = cache() / "s390x" / "layer"
        _fill(layer)
        _compile_c(layer)
        python = cache() / "s390x" / "python"
        # -s and -p: tracebacks show the path the file has in the guest.
        line = [str(python), "-m", "compileall", "-q", "-j1", "-s", str(layer), "-p", "/", str(layer)]
        # Broken sources are the tests' business: what does not compile here fails there.
        subprocess.run(line, check=False, stdout=subprocess.DEVNULL)
        with target.open("wb") as stream:
            with root_archive().open("rb") as root:
                shutil.copyfileobj(root, stream)
            _append_archive(stream.fileno(), layer)
            inside = last / str(GUEST_EXCHANGE).lstrip("/")
            inside.mkdir(parents=True)
            for path in exchange.iterdir():
                shutil.copyfile(path, inside / path.name)
            _append_archive(stream.fileno(), last)
    shutil.rmtree(last)


def _compile_c(layer: Path) -> None:
    """Compile the benchmark's C program, where there is a cross compiler: the guest has none."""
    source, program = REPO / "tests/bench/subchannel.c", layer / str(REPO).lstrip("/") / "tests/bench/subchannel"
    compiler = shutil.which("s390x-linux-gnu-gcc")
    if compiler is None or (program.exists() and program.stat().st_mtime > source.stat().st_mtime):
        return
    subprocess.run([compiler, "-O2", "-static", "-o", str(program), str(source)], check=True)


@contextmanager
def _locked() -> Iterator[None]:
    # Two runs of one checkout share the layer.
    with (cache() / "s390x" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _append_archive(output: int, directory: Path) -> None:
    # cpio pads to 512 bytes, which the kernel's unpacker skips.
    names = "".join(f"{path.relative_to(directory)}\0" for path in sorted(directory.rglob("*")))
    subprocess.run(
        ["cpio", "--null", "--create", "--format=newc", "--owner=+0:+0", "--quiet"],
        input=names.encode(),
        stdout=output,
        cwd=directory,
        check=True,
    )


def _fill(layer: Path) -> None:
    """Bring ``layer`` up to date: copies what is new, removes what went, keeps the bytecode of the rest."""
    wanted: dict[Path, Path] = {}
    for tree in TREES:
        for path in (REPO / tree).rglob("*"):
            if "__pycache__" not in path.parts and path.is_file():
                wanted[path.relative_to("/")] = path
    for name in FILES:
        if (REPO / name).exists():
            wanted[(REPO / name).relative_to("/")] = REPO / name
    for inside, path in _environment_files():
        wanted[_DIST_PACKAGES / inside] = path
    for path in list(layer.rglob("*")) if layer.exists() else []:
        source = path.relative_to(layer)
        if path.parent.name == "__pycache__":
            source = source.parent.parent / f"{source.name.partition('.')[0]}.py"
        if path.is_file() and source not in wanted and path.name != "subchannel":
            path.unlink()
    for inside, path in wanted.items():
        copy, status = layer / inside, path.stat()
        if copy.exists() and (copy.stat().st_mtime_ns, copy.stat().st_size) == (status.st_mtime_ns, status.st_size):
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
        # Whatever umask the checkout was written under, unprivileged processes read it in the guest.
        copy.chmod(0o755 if status.st_mode & 0o100 else 0o644)


def _environment_files() -> Iterator[tuple[Path, Path]]:
    """Give the files of ``PACKAGES`` and of all they need: their place below dist-packages, and the file."""
    waiting, seen = list(PACKAGES), set(LEFT_OUT)
    while waiting:
        name = waiting.pop()
        key = re.sub(r"[-_.]+", "-", name).lower()
        if key in seen or name in seen:
            continue
        seen.add(key)
        distribution = importlib.metadata.distribution(name)
        for requirement in distribution.requires or []:
            # Markers other than "extra" are about old Pythons and Windows: those are not installed.
            needed = re.match(r"[A-Za-z0-9._-]+", requirement)
            if needed is not None and "extra ==" not in requirement and _installed(needed[0]):
                waiting.append(needed[0])
        for file in distribution.files or []:
            if ".." in file.parts or "__pycache__" in file.parts:
                continue
            if str(file).startswith("pygments/lexers/") and file.stem not in LEXERS:
                continue
            if file.suffix == ".so":
                sys.stderr.write(f"lab: {file} is for this machine's processor; the guest goes without\n")
                continue
            yield Path(*file.parts), Path(str(file.locate()))


def _installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
