"""A server whose fds are kept for it, behind a wall: a call fails while it stores, or while it begins again.

``vfiod keeper`` and its server are real, and so is the ``kill -9``. What a manager could see before it must be there
afterwards, or the log has said that it would not be, or what is missing is named (``lost``).
"""

from __future__ import annotations

import contextlib
import enum
import os
import signal
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from tests.fuzz.faults.injector import Injector
from tests.fuzz.faults.row import PATIENCE, fds_of, plain, until
from tests.fuzz.faults.wall import Wall
from tests.integration.exports.hypervisor import eventfd, memfd, rung

from vfiod.client.errors import ConnectFailed, ConnectionLost
from vfiod.client.methods.values import VectorFds
from vfiod.client.sync import Client
from vfiod.protocol.catalogue.monitor import MachineRestored
from vfiod.protocol.errors import RemoteError

__all__ = ["Shelf", "When"]

MiB = 1 << 20
SCRATCH, RAISE, ACKNOWLEDGE = 0x04, 0x14, 0x18
GIVEN_UP = "From now on a crash of this server loses its devices"


class When(enum.StrEnum):
    """When a call fails."""

    STORING = "storing"
    BEGINNING = "beginning"


class Shelf:
    """See the module's text."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "qmp"
        self._log_path = directory / "log"
        self._stack = contextlib.ExitStack()
        self._reference: tuple[Counter[str], Counter[str]] | None = None
        self._value = 0
        command = [
            *(sys.executable, "-m", "vfiod.client.program", "keeper", "--restarts", "1000", "--"),
            *("--name", "vm", "--qmp", f"unix:{self._path}"),
        ]
        with self._log_path.open("w") as log:
            self._wall = Wall(command, log, children=True)
        self._stack.callback(self._end)
        try:
            self._pid = self._serving(0)
            self.client = Client.connect(self._path, timeout=PATIENCE)
            enter = self._stack.enter_context
            self._bell, self._memory = enter(eventfd()), enter(memfd(MiB))
            self._add("n0")
            self.client.region_write(device="n0", region="config", offset=4, size=2, value=6)
            self.client.dma_map(iova=0, size=MiB, fd=self._memory)
            self.client.irq_start(
                device="n0", index="msi", eventfds=[VectorFds(vector=0, trigger=self._bell)], mode="relayed"
            )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End all of it."""
        with contextlib.suppress(AttributeError):
            self.client.close()
        self._stack.close()

    def _end(self) -> None:
        self._wall.disarm()
        self._wall.process.terminate()
        self._wall.close()

    def log(self) -> str:
        return self._log_path.read_text()

    def _serving(self, before: int) -> int:
        """The process of a server that is another one than before, once it accepts."""
        end = time.monotonic() + PATIENCE
        while True:
            assert self._wall.process.poll() is None and time.monotonic() < end, self.log()
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
                probe.connect(str(self._path))
                pid, _, _ = struct.unpack("iII", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
                if pid != before and probe.recv(1):
                    return int(pid)
            time.sleep(0.01)

    def _connect(self) -> None:
        self.client.close()
        end = time.monotonic() + PATIENCE
        while True:
            try:
                self.client = Client.connect(self._path, timeout=PATIENCE)
            except (ConnectFailed, ConnectionLost):
                assert time.monotonic() < end, self.log()
                time.sleep(0.01)
            else:
                return

    def _add(self, id: str) -> None:
        uuid = self.client.mdev_create(parent="primer", type="primer-pci").uuid
        self.client.device_add(driver="vfio-pci", id=id, mdev=uuid)

    def _picture(self) -> Any:
        shown = (
            *(self.client.query_devices(), self.client.query_dma(), self.client.query_objects()),
            *(self.client.query_fdsets(), self.client.query_machine().mdevs),
            [one.active for one in self.client.query_irqs()],
        )
        return plain(msgspec.to_builtins(shown))

    # --- what a manager does ---------------------------------------------------------------------------------

    def _steps(self) -> list[Callable[[], Any]]:
        client = self.client
        return [
            lambda: self._add("n1"),
            lambda: client.irq_start(
                device="n1", index="msi", eventfds=[VectorFds(vector=0, trigger=self._bell)], mode="relayed"
            ),
            lambda: client.object_add(qom_type="memory-backend-fd", id="ram", fd=self._memory),
            lambda: client.dma_map(iova=16 * MiB, size=MiB, memory_backend="ram"),
        ]

    def _tidy(self) -> None:
        """As it was in the beginning, but for ids."""
        client = self.client
        with contextlib.suppress(RemoteError):
            client.device_del(id="n1")
        until(lambda: [one.id for one in client.query_devices()] == ["n0"])
        client.dma_unmap(iova=16 * MiB, size=MiB)
        if client.query_objects():
            client.object_del(id="ram")
        used = {one.mdev.uuid for one in client.query_devices() if one.mdev}
        for uuid in client.query_machine().mdevs:
            if uuid not in used:
                client.mdev_destroy(uuid=uuid)

    def _work(self) -> None:
        """Each step is done, or refused, or nobody knows: the session is over."""
        for number in range(len(self._steps())):
            try:
                self._steps()[number]()
            except RemoteError:
                continue
            except ConnectionLost:
                self._connect()

    def _probe(self) -> None:
        self._value += 1
        value = self._value & 0xFFFF
        client = self.client
        client.region_write(device="n0", region="bar0", offset=SCRATCH, size=4, value=value)
        got = client.region_read(device="n0", region="bar0", offset=SCRATCH, size=4).value
        assert got == value ^ 0xFFFF_FFFF, got
        client.region_write(device="n0", region="bar0", offset=RAISE, size=4, value=1)
        assert rung(self._bell) >= 1
        client.region_write(device="n0", region="bar0", offset=ACKNOWLEDGE, size=4, value=1)

    # --- one life --------------------------------------------------------------------------------------------

    def live(self, when: When, injector: Injector) -> tuple[str, list[str]]:
        """Work, be killed, and begin again.

        Returns:
            what became of it, in a word and more; complaints. The shelf is of no use unless it is "whole".

        """
        said = len(self.log())
        try:
            if self._reference is not None:
                self._learn()
            if when is When.STORING:
                self._wall.arm(injector)
            self._work()
            self._wall.disarm()
            before = self._picture()
            given_up = GIVEN_UP in self.log()[said:]
            if when is When.BEGINNING:
                self._wall.arm(injector, since="connect")
            dead = self._pid
            os.kill(dead, signal.SIGKILL)
            self._pid = self._serving(dead)
            self._wall.disarm()
            self._connect()
            if given_up or GIVEN_UP in self.log()[said:]:
                return "given up", self._traces(said)
            told = self.client.query_machine().restored
            assert isinstance(told, MachineRestored), "nothing was restored"
            if told.lost:
                return f"lost: {told.lost}", self._traces(said)
            after = self._picture()
            assert after == before, f"{after} != {before}"
            self._probe()
            self._tidy()
            self._judge_fds()
        except Exception as error:
            return "wrong", [f"{type(error).__name__}: {error}", f"log: {self.log()[said:]}"]
        return "whole", self._traces(said)

    def _traces(self, said: int) -> list[str]:
        log = self.log()[said:]
        return [f"log: {log}"] if "Traceback" in log or "ResourceWarning" in log else []

    def _learn(self) -> bool:
        """Whether there are no fds too many. What has gone since (the keeper hears later) is expected no more."""
        now = fds_of(self._pid), fds_of(self._wall.process.pid)
        if self._reference is None or all(one <= other for one, other in zip(now, self._reference, strict=True)):
            self._reference = now
            return True
        return False

    def _judge_fds(self) -> None:
        """Nothing is left in the server, nor in the keeper; that all is there was seen already."""
        end = time.monotonic() + PATIENCE
        while not self._learn():
            if time.monotonic() > end:
                assert self._reference is not None
                now = fds_of(self._pid), fds_of(self._wall.process.pid)
                left = [one - other for one, other in zip(now, self._reference, strict=True)]
                raise AssertionError(f"fds left: {left}")
            time.sleep(0.01)
