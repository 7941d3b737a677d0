"""What is being done to the drivers of which devices, on disk before it is done: a crash half way can be put right.

One file per device in a directory of mode 0700, replaced whole and synced (write, fsync, rename, fsync of the
directory). It says what the device had; it stays while the device is VFIO's, so that giving it back finds the driver it
came from. The directory is below ``/run`` by default: after a boot the kernel has chosen drivers anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

import msgspec

from vfiod.client.host.sysfs import HostError, normal_address
from vfiod.protocol.errors import errno_name

__all__ = ["DEFAULT_PLACE", "Entry", "Journal"]

DEFAULT_PLACE: Final = Path("/run/vfiod/host")
SUFFIX: Final = ".json"
LOCK_SECONDS: Final = 30.0
"""How long to wait for another program that is at it: binding takes a moment, a device that is held may take long."""

RETRY_SECONDS: Final = 0.05


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One device.

    Attributes:
        address: ``DDDD:BB:DD.F``.
        phase: ``binding`` and ``unbinding``: begun, and not known to have ended; ``bound``: it is VFIO's.
        driver: the driver it is given to.
        original: the driver it had before it was VFIO's; None: none.
        override: its ``driver_override`` of then; None: none.
        known: False: nobody noted what it had; giving it back lets the kernel choose.
        step: what was about to be written, for people.
        boot: the kernel's boot id; an entry of another boot is void.

    """

    address: str
    phase: Literal["binding", "bound", "unbinding"]
    driver: str
    original: str | None = None
    override: str | None = None
    known: bool = True
    step: str = ""
    boot: str = ""


class Journal:
    """The entries in one directory.

    Args:
        place: made when it is first written to; for one user alone.

    """

    def __init__(self, place: Path | str = DEFAULT_PLACE) -> None:
        self.place = Path(place)

    def entry(self, address: str) -> Entry | None:
        """A device's entry, or None. Raises HostError for a file that is none."""
        path = self._path(address)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise HostError(f"Cannot read {path}: {errno_name(error.errno or 0)}") from error
        try:
            entry = msgspec.json.decode(data, type=Entry)
        except msgspec.MsgspecError as error:
            raise HostError(
                f"{path} is no entry of the journal ({error}): look at the device's driver, then remove it"
            ) from error
        return entry if entry.boot == boot_id() else None

    def entries(self) -> Iterator[Entry]:
        """Every entry of this boot, lowest address first."""
        for path in sorted(self.place.glob("*" + SUFFIX)):
            entry = self.entry(path.name.removesuffix(SUFFIX))
            if entry is not None:
                yield entry

    def put(self, entry: Entry) -> None:
        """Have an entry on disk when this returns."""
        path = self._path(entry.address)
        scratch = path.with_suffix(".new")  # a crash leaves it behind at worst; nobody reads it
        self._make()
        try:
            fd = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                os.write(fd, msgspec.json.encode(msgspec.structs.replace(entry, boot=boot_id())))
                os.fsync(fd)
            finally:
                os.close(fd)
            scratch.replace(path)
            self._sync()
        except OSError as error:
            raise HostError(f"Cannot write {path}: {errno_name(error.errno or 0)}") from error

    def remove(self, address: str) -> None:
        """Have no entry on disk when this returns."""
        self._path(address).unlink(missing_ok=True)
        if self.place.exists():
            self._sync()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only one at it. The lock ends with its process, however that ends. Raises HostError."""
        self._make()
        fd = os.open(self.place / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            deadline = time.monotonic() + LOCK_SECONDS
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise HostError(
                            f"Another program has been binding devices for {LOCK_SECONDS:g} s ({self.place}/lock is"
                            " taken): a device that somebody still holds keeps it waiting"
                        ) from None
                    time.sleep(RETRY_SECONDS)
            yield
        finally:
            os.close(fd)

    def _path(self, address: str) -> Path:
        return self.place / (normal_address(address) + SUFFIX)

    def _make(self) -> None:
        try:
            self.place.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self.place.stat()
        except OSError as error:
            raise HostError(
                f"Cannot make {self.place}: {errno_name(error.errno or 0)}; this needs root, or --state DIR"
            ) from error
        if found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise HostError(f"{self.place} is not this user's alone (mode 0700): what it says could be anybody's")

    def _sync(self) -> None:
        fd = os.open(self.place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def boot_id() -> str:
    """This boot's name (``random(4)``); empty where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
