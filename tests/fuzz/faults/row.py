"""Servers that take each other's place, each behind a wall: one system call fails, and exactly one owns everything.

A manager's session and a hypervisor are connected all the time. After each take-over that came to something, or to
nothing, they do what they do: registers, DMA, interrupts. Who owns it then is the next one's giver.
"""

from __future__ import annotations

import contextlib
import enum
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from tests.fuzz.faults.injector import Fault, Injector
from tests.fuzz.faults.wall import Wall
from tests.integration.exports.hypervisor import Hypervisor, eventfd, memfd, rung

from vfiod.client.methods.values import VectorFds
from vfiod.client.sync import Client

__all__ = ["PATIENCE", "End", "Row", "Walled", "fds_of", "plain", "until"]

PATIENCE = 120.0
"""Seconds that nothing takes; when they are over, something hangs."""

MiB = 1 << 20
SCRATCH, RAISE, ACKNOWLEDGE = 0x04, 0x14, 0x18


class End(enum.StrEnum):
    """Whose call fails."""

    GIVER = "giver"
    TAKER = "taker"


def until(condition: Callable[[], bool], what: str = "it never came") -> None:
    """Wait for a condition."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(what)
        time.sleep(0.005)


_NUMBERS = re.compile(r"\[\d+\]|\d{5,}|^/.*/log\d+")


def fds_of(process: int) -> Counter[str]:
    """A process's fds, by what they are."""
    found: Counter[str] = Counter()
    for name in os.listdir(f"/proc/{process}/fd"):
        with contextlib.suppress(OSError):
            found[_NUMBERS.sub("N", os.readlink(f"/proc/{process}/fd/{name}"))] += 1
    return found


class Walled:
    """One server process behind a wall."""

    def __init__(self, log: Path, arguments: list[str], injector: Injector | None, since: str | None, **more: Any):
        self._log = log
        command = [sys.executable, "-m", "vfiod.server", "--log-level", "info", *arguments]
        with log.open("w") as file:
            self.wall = Wall(command, file, injector=injector, since=since, **more)
        self.process = self.wall.process

    def log(self) -> str:
        return self._log.read_text()

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    @property
    def serves(self) -> bool:
        return "Serving " in self.log()

    def kill(self) -> None:
        self.process.kill()
        self.wall.close()


class Row:
    """See the module's text.

    Attributes:
        servers: all so far; the last one owns everything, unless it failed.

    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._hand = directory / "hand"
        self._qmp = directory / "qmp"
        self._stack = contextlib.ExitStack()
        self._number = 0
        self._value = 0
        self._shown: Any = None
        self.fds_of_heirs: Counter[str] | None = None
        self.owner = self._start("--name", "vm", "--qmp", f"unix:{self._qmp}", "--hand-over", f"unix:{self._hand}")
        self._stack.callback(lambda: self.owner.kill())
        try:
            self._furnish()
        except BaseException:
            self._stack.close()
            raise

    def close(self) -> None:
        """End all of it."""
        self._stack.close()

    def _start(self, *arguments: str, injector: Injector | None = None, since: str | None = None) -> Walled:
        self._number += 1
        log = self._directory / f"log{self._number}"
        return Walled(log, [*arguments, "--allow-path", str(self._directory)], injector, since)

    def _furnish(self) -> None:
        until(lambda: self.owner.serves or self.owner.ended)
        enter = self._stack.enter_context
        self.client = enter(Client.connect(self._qmp, timeout=PATIENCE))
        self._bell, self._line, self._memory = enter(eventfd()), enter(eventfd()), enter(memfd(MiB, b"from the guest"))
        for id in ("n0", "n1"):
            uuid = self.client.mdev_create(parent="primer", type="primer-pci").uuid
            self.client.device_add(driver="vfio-pci", id=id, mdev=uuid)
        self.client.region_write(device="n0", region="config", offset=4, size=2, value=6)
        self.client.object_add(qom_type="memory-backend-fd", id="ram", fd=self._memory)
        self.client.dma_map(iova=16 * MiB, size=MiB, memory_backend="ram")
        eventfds = [VectorFds(vector=0, trigger=self._bell)]
        self._told = enter(self.client.events("IRQ"))
        self.client.irq_start(device="n0", index="msix", eventfds=eventfds, mode="relayed")
        path = self._directory / "n1.sock"
        self.client.device_export_add(id="e0", type="vfio-user", device="n1", path=str(path))
        self._hypervisor = Hypervisor(path)
        self._stack.callback(self._hypervisor.close)
        self._hypervisor.map(0, MiB, self._memory.number)
        self._hypervisor.trigger(2, self._line.number)
        self._hypervisor.master()
        self._probe()
        self._shown = self._picture()

    def _picture(self) -> Any:
        """What a manager can ask, without what counts on."""
        shown = (
            *(self.client.query_devices(), self.client.query_dma(), self.client.query_objects()),
            *(self.client.query_fdsets(), self.client.query_machine().mdevs, self.client.query_device_exports()),
        )
        return plain(msgspec.to_builtins(shown))

    def _probe(self) -> None:
        """Everything does what it did, by the connections there are."""
        self._value += 1
        value = self._value & 0xFFFF
        self.client.region_write(device="n0", region="bar0", offset=SCRATCH, size=4, value=value)
        got = self.client.region_read(device="n0", region="bar0", offset=SCRATCH, size=4).value
        assert got == value ^ 0xFFFF_FFFF, got
        self.client.region_write(device="n0", region="bar0", offset=RAISE, size=4, value=1)
        assert rung(self._bell) == 1
        self._told.get(PATIENCE)  # perhaps a second later (EVENT_RATE_PERIOD_MS): nothing is on its way any more
        self.client.region_write(device="n0", region="bar0", offset=ACKNOWLEDGE, size=4, value=1)
        self._hypervisor.write(0, SCRATCH, value)
        assert self._hypervisor.read(0, SCRATCH) == value ^ 0xFFFF_FFFF
        self._hypervisor.write(0, RAISE, 1)
        assert rung(self._line) == 1
        self._hypervisor.write(0, ACKNOWLEDGE, 1)
        assert self._hypervisor.dma(0, 64, 14, 1) == 1
        shown = self._picture()
        assert self._shown in (None, shown), f"{shown} != {self._shown}"

    # --- one take-over -----------------------------------------------------------------------------------------

    def replace(self, end: End, fault: Fault | None = None) -> tuple[Injector, bool, list[str]]:
        """Let a new one take everything over, while a call fails.

        Returns:
            what was called; whether it came to a take-over; complaints: after one the row is of no use.

        """
        injector = Injector(fault)
        giver = self.owner
        before = fds_of(giver.process.pid)
        if end is End.GIVER:
            giver.wall.arm(injector)
        more: dict[str, Any] = {"injector": injector, "since": "connect"} if end is End.TAKER else {}
        taker = self._start("--take-over", f"unix:{self._hand}", **more)
        complaints: list[str] = []
        try:
            # Both may be there for a while: who loses ends.
            until(lambda: giver.ended or taker.ended, "both live on")
            until(lambda: taker.ended or taker.serves, "the taker does not serve")
            giver.wall.disarm()
            taker.wall.disarm()
            if giver.ended and taker.ended:
                raise AssertionError("both are dead")
            self.owner = giver if taker.ended else taker
            (taker if taker.ended else giver).wall.close()
            self._probe()
            self._judge_fds(giver, taker, before)
        except Exception as error:
            complaints.append(f"{type(error).__name__}: {error}")
        complaints += [
            f"a traceback in the {who}'s log" for who, one in (("giver", giver), ("taker", taker)) if _bad(one.log())
        ]
        if complaints:
            complaints += [f"giver's log: {giver.log()}", f"taker's log: {taker.log()}"]
            for one in (giver, taker):
                one.kill()
        return injector, self.owner is taker, complaints

    def _judge_fds(self, giver: Walled, taker: Walled, before: Counter[str]) -> None:
        wanted: Counter[str] | None = before if self.owner is giver else self.fds_of_heirs
        if wanted is None:
            return
        pid = self.owner.process.pid
        end = time.monotonic() + PATIENCE
        while (now := fds_of(pid)) != wanted:
            if time.monotonic() > end:
                who = "giver" if self.owner is giver else "taker"
                raise AssertionError(f"fds of the {who} left: {now - wanted}, gone: {wanted - now}")
            time.sleep(0.01)


def _bad(log: str) -> bool:
    return "Traceback" in log or "ResourceWarning" in log


_COUNTED = frozenset({"requests", "errors", "events", "number", "pid", "fd", "accesses", "since"})


def plain(value: Any) -> Any:
    """What was shown, without what counts on."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items() if key not in _COUNTED}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value
