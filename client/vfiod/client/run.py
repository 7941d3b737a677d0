"""``vfiod run``: from a device to a guest that has it, in one command.

It starts a vfiod, gives it the devices, exports each (vfio-user), starts the hypervisor with the sockets' paths in its
arguments, and waits. Whoever ends first takes the other along; then devices are removed and drivers restored.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import pwd
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Final, NoReturn

from vfiod.client.errors import ClientError
from vfiod.client.host.journal import DEFAULT_PLACE, Journal
from vfiod.client.manager import Manager
from vfiod.client.progress import Progress
from vfiod.client.signals import held, let_in
from vfiod.protocol.errors import VfiodError

__all__ = ["attach_arguments", "main", "memory_of", "substituted"]

FORWARDED: Final = frozenset(
    {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT}
)
ENDING: Final = frozenset({signal.SIGTERM, signal.SIGHUP})
KEYS: Final = frozenset({signal.SIGINT, signal.SIGQUIT})
"""Those the terminal sends to the whole process group; a hang-up goes to the session's leader alone."""

FROM_KERNEL: Final = 0x80
"""si_code of a signal of the terminal (``SI_KERNEL``): the hypervisor, in the same process group, has had it too."""

GRACE_SECONDS: Final = 20.0
"""What a hypervisor gets between SIGTERM and SIGKILL when vfiod has died."""

OPTIONS: Final = (
    "id", "vf_token", "romfile", "rombar", "multifunction", "mmap_timeout_ms", "share_fd", "on_request",
    "on_request_timeout_ms", "x_irqfd", "x_no_mmap", "x_noiommu",
)  # fmt: skip
"""What --host takes after the address: these of device_add."""

DEFAULT_MEMORY: Final = 128 << 20
"""Bytes of a QEMU's guest without ``-m``."""

PLACEHOLDER: Final = re.compile(r"\{(export|qmp)(?::([^{}\"]*))?\}")
UNITS: Final = {"": 1 << 20, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def parser() -> argparse.ArgumentParser:
    """The command line, up to ``--``."""
    made = argparse.ArgumentParser(
        "vfiod run",
        usage="vfiod run [--host ADDRESS[,id=ID]]... [--mdev TYPE[,id=ID][,NAME=VALUE]...]... [options]"
        " -- HYPERVISOR ARGUMENT...",
        description="Run a hypervisor with devices that vfiod holds. In its arguments, {export} stands for the only"
        " device's vfio-user socket, {export:ID} for that of one of several, {qmp} for vfiod's monitor.",
        epilog="Exit status: the hypervisor's; 128 + N when signal N ended it; 1 when it could not be started, or vfiod"
        " died.",
        allow_abbrev=False,
    )
    add = made.add_argument
    add("--host", metavar="ADDRESS", action="append", default=[], help="a PCI device; its id is hostN unless given")
    add("--mdev", metavar="TYPE", action="append", default=[], help="a mediated device of vfiod's; its id is mdevN")
    add("--bind", action="store_true", help="bind the PCI devices to vfio-pci, and back at the end")
    add("--force", action="store_true", help="bind them even when the host is using them")
    add("--interface", choices=("auto", "group", "cdev"), default="auto", help="which of VFIO's (default: auto)")
    add("--attach", choices=("qemu", "none"), default="none", help="qemu: append a -device for each device")
    add("--name", default="vm", help="the VM's name (default: vm)")
    add("--memory", metavar="SIZE", help="guest memory to pin, such as 4G (default: what QEMU's -m says)")
    add("--user", metavar="USER", help="run vfiod as this user, by name or number, with no rights of root")
    add("--state", metavar="DIR", default=DEFAULT_PLACE, help=f"where bindings are noted (default: {DEFAULT_PLACE})")
    add("--quiet", action="store_true", help="do not tell what is being done")
    return made


def main(argv: list[str]) -> int:
    """Run it. The hypervisor's exit status, or 1: standard error says why."""
    given, separator, command = _split(argv)
    options = parser().parse_args(given)
    if not separator or not command:
        parser().error("the hypervisor is missing: put '--' and its command line at the end")
    progress = Progress("vfiod run", quiet=options.quiet)
    try:
        with _ended_by_signals():
            return _run(options, command, progress)
    except (VfiodError, OSError) as error:
        print(f"vfiod run: {error}", file=sys.stderr)
        return 1


def _split(argv: list[str]) -> tuple[list[str], bool, list[str]]:
    if "--" not in argv:
        return argv, False, []
    at = argv.index("--")
    return argv[:at], True, argv[at + 1 :]


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """While devices are prepared and given back, a signal that ends programs unwinds this one, as Ctrl-C does."""

    def end(number: int, _: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    former = {number: signal.signal(number, end) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _run(options: argparse.Namespace, command: list[str], progress: Progress) -> int:
    hosts = [_device(text, "host", number) for number, text in enumerate(options.host)]
    mdevs = [_device(text, "mdev", number) for number, text in enumerate(options.mdev)]
    ids = [id for _, id, _ in (*hosts, *mdevs)]
    doubled = sorted({id for id in ids if ids.count(id) > 1})
    if doubled:
        raise ClientError(f"Two devices are called '{doubled[0]}': give each its own id=")
    substituted(command, dict.fromkeys(ids, Path()), Path())  # what is wrong with it, before anything is started
    uid, gid = _user(options.user)
    memory = memory_of(command) if options.memory is None else _size(options.memory, "--memory")
    status: int | None = None
    try:
        with held():  # signals come in while we wait for vfiod; not between what is made and who will take it back
            with progress.step("starting vfiod"):
                vm = Manager.start(
                    options.name, uid=uid, gid=gid, memory=memory, journal=Journal(options.state), progress=progress
                )
            with vm:
                with let_in():
                    for address, id, extra in hosts:
                        vm.add_device(
                            address, id=id, bind=options.bind, force=options.force, interface=options.interface, **extra
                        )
                    for kind, id, extra in mdevs:
                        vm.add_mediated(kind, id=id, parameters=extra)
                    exports = {id: vm.export(id) for id in ids}
                words = substituted(command, exports, vm.path)
                if options.attach == "qemu":
                    words += attach_arguments(exports)
                    if not any("share=on" in one for one in words):
                        progress.say(
                            "the guest's memory is not shared (share=on): devices of the kernel cannot reach it"
                        )
                progress.say(f"starting {words[0]} with {', '.join(ids) or 'no device'}")
                status = _supervise(vm, words)
    except VfiodError as error:
        if status is None:
            raise
        print(f"vfiod run: {error}", file=sys.stderr)
        return status or 1
    return status


def _device(text: str, kind: str, number: int) -> tuple[str, str, dict[str, Any]]:
    """``WHAT[,id=ID][,NAME=VALUE]...``: arguments of device_add, or parameters of mdev-create."""
    what, *pairs = text.split(",")
    extra: dict[str, Any] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign or not name:
            raise ClientError(f"--{kind} takes {kind.upper()}[,NAME=VALUE]..., got '{pair}' in '{text}'")
        if kind == "host" and name.replace("-", "_") not in OPTIONS:
            raise ClientError(f"--host takes {', '.join(one.replace('_', '-') for one in OPTIONS)}; got '{name}'")
        extra[name.replace("-", "_") if kind == "host" else name] = value if name == "id" else _typed(value)
    if not what:
        raise ClientError(f"--{kind} '{text}' does not say which")
    return what, extra.pop("id", f"{kind}{number}"), extra


def _typed(text: str) -> Any:
    """A value as JSON where it is: numbers, true, false; others are text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def substituted(command: Sequence[str], exports: Mapping[str, Path], qmp: Path) -> list[str]:
    """The command with its placeholders replaced. Raises ClientError for one that stands for nothing."""

    def value(match: re.Match[str]) -> str:
        kind, id = match.groups()
        if kind == "qmp":
            return str(qmp)
        if id is None and len(exports) == 1:
            return str(next(iter(exports.values())))
        if id not in exports:
            known = ", ".join(exports) or "none: give --host or --mdev"
            said = "{export} means the only device" if id is None else f"There is no device '{id}'"
            raise ClientError(f"{said}; the devices are {known}" + (": say {export:ID}" if id is None else ""))
        return str(exports[id])

    return [PLACEHOLDER.sub(value, word) for word in command]


def attach_arguments(exports: Mapping[str, Path]) -> list[str]:
    """What QEMU (10.1 or later) takes to attach to each."""
    words = []
    for id, path in exports.items():
        device = {"driver": "vfio-user-pci", "id": id, "socket": {"type": "unix", "path": str(path)}}
        words += ["-device", json.dumps(device)]
    return words


def memory_of(command: Sequence[str]) -> int:
    """Bytes of guest memory, by QEMU's ``-m`` (its last one; a number alone is MiB); 0 for another hypervisor."""
    found = [after for word, after in itertools.pairwise(command) if word in ("-m", "--m")]
    if found:
        parts = dict(part.partition("=")[::2] for part in found[-1].split(",") if "=" in part)
        # maxmem: hot-plugged memory is pinned too.
        return max(_size(one, "-m") for one in (parts.get("size", found[-1].split(",")[0]), parts.get("maxmem", "0")))
    return DEFAULT_MEMORY if Path(command[0]).name.startswith("qemu-system-") else 0


def _size(text: str, what: str) -> int:
    match = re.fullmatch(r"(?:size=)?(\d{1,12})([bkmgt]?)(?:i?b)?", text.lower())
    if match is None:
        raise ClientError(f"{what} takes a size such as 512M or 4G, got '{text}'")
    return int(match[1]) * UNITS[match[2]]


def _user(text: str | None) -> tuple[int | None, int | None]:
    if text is None:
        return None, None
    try:
        entry = pwd.getpwuid(int(text)) if text.isdigit() else pwd.getpwnam(text)
    except KeyError:
        if text.isdigit():
            return int(text), int(text)
        raise ClientError(f"--user: there is no user '{text}'") from None
    if entry.pw_uid == 0:
        raise ClientError("--user is for a user without root's rights; without it vfiod runs as this one")
    return entry.pw_uid, entry.pw_gid


def _supervise(vm: Manager, words: list[str]) -> int:
    """Start the hypervisor, forward signals, and wait for the end of either. The hypervisor's exit status."""
    watched = FORWARDED | {signal.SIGCHLD}
    former = signal.pthread_sigmask(signal.SIG_BLOCK, watched)

    def begin() -> None:
        """In the new process: the signals it would have had. One that came since the fork takes effect here."""
        for number in FORWARDED:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, former)

    try:
        with let_in():
            pass  # one that came until they were blocked
        try:
            hypervisor = subprocess.Popen(
                words,
                close_fds=False,  # what this program inherited is meant for it; our own fds are not inheritable
                preexec_fn=begin,  # noqa: PLW1509 - nobody else runs in this process
            )
        except OSError as error:
            raise ClientError(f"Cannot run {words[0]}: {error.strerror}") from error
        early = signal.sigpending()  # perhaps from before the fork: better twice than never
        try:
            lost = _watch(vm, hypervisor, watched, early)
        except BaseException:
            hypervisor.kill()
            hypervisor.wait()
            raise
    finally:
        while signal.sigtimedwait(watched, 0) is not None:
            pass  # what came at the very end is done with
        signal.pthread_sigmask(signal.SIG_SETMASK, former)
    status = hypervisor.returncode if hypervisor.returncode >= 0 else 128 - hypervisor.returncode
    return status or int(lost)


def _watch(
    vm: Manager, hypervisor: subprocess.Popen[bytes], watched: frozenset[signal.Signals], early: set[signal.Signals]
) -> bool:
    """Until the hypervisor has ended. Whether vfiod had died before."""
    lost, deadline = False, None
    while hypervisor.poll() is None:
        if not lost and (status := vm.process.poll()) is not None:
            lost = True
            how = f"by signal {-status}" if status < 0 else f"with status {status}"
            print(
                f"vfiod run: vfiod has ended ({how}) and the devices with it: ending the hypervisor, process"
                f" {hypervisor.pid}, by SIGTERM",
                file=sys.stderr,
            )
            hypervisor.terminate()
            deadline = GRACE_SECONDS
        told = signal.sigtimedwait(watched, deadline) if deadline is not None else signal.sigwaitinfo(watched)
        if told is None:
            print(f"vfiod run: it did not end within {GRACE_SECONDS:g} s: killing it", file=sys.stderr)
            hypervisor.kill()
            deadline = None
        elif told.si_signo in FORWARDED:
            if told.si_code != FROM_KERNEL or told.si_signo not in KEYS or told.si_signo in early:
                hypervisor.send_signal(told.si_signo)
            early.discard(signal.Signals(told.si_signo))
    return lost
