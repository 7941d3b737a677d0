"""What every part of the lab knows: where things stand, and the two ways it can fail."""

from __future__ import annotations

import os
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
#: This checkout, whichever one the virtual environment was installed from.
SOURCES = [str(REPO), *(str(REPO / root) for root in ("protocol", "server", "client"))]
#: Where the exchange directory stands inside the guest. ``/run`` is always the guest's own memory.
GUEST_EXCHANGE = Path("/run/vfiod-lab")
#: Seconds one guest test may take, fixtures included. Emulation on a busy host is slow; a module whose tests take
#: longer still (an emulator in the emulator) says so: ``TEST_SECONDS = 900``.
TEST_SECONDS = float(os.environ.get("VFIOD_LAB_TEST_SECONDS", "300"))
#: QEMU older than this lacks what the tests need.
QEMU_MINIMUM = 10


class LabUnavailableError(RuntimeError):
    """The lab cannot run here; the message says what is missing and how to get it."""


class GuestDiedError(RuntimeError):
    """The guest did not boot, died, or ran out of time; the message ends with its console's last lines."""


def cache() -> Path:
    """Return where the lab keeps what it built: ``VFIOD_LAB_CACHE``, or ``.lab`` of the repository."""
    return Path(os.environ.get("VFIOD_LAB_CACHE") or REPO / ".lab")


def find_kernel(architecture: str = "x86_64") -> Path | None:
    """Return the kernel to boot: the environment's, the ready one beside the repository, the one built here."""
    lab = Path(os.environ.get("VFIOD_LAB") or REPO.parent / "shared" / "lab")
    suffix = "" if architecture == "x86_64" else f"_{architecture.upper()}"
    named = os.environ.get(f"VFIOD_LAB_KERNEL{suffix}")
    candidates = [Path(named)] if named else []
    candidates += [lab / architecture / "bzImage", cache() / architecture / "bzImage"]
    return next((path for path in candidates if os.access(path, os.R_OK)), None)
