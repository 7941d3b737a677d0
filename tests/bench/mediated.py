"""Mediated devices: a register of a device in Python, through vfiod and its layers, to calling the device itself."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.bench.measuring import Line, Rounds, paired, per_call
from tests.bench.processes import vfiod

from vfiod.server.backends.mediated import MediatedDevices
from vfiod.server.mdev.bus import MdevBus
from vfiod.server.mdev.parent import Host
from vfiod.server.mdev.samples.pci import Primer, PrimerDevice

__all__ = ["lines"]

SMALL = b'{"execute":"query-version"}'


class _Unhurried(PrimerDevice):
    """The same device, without its promise never to wait."""

    quick = False


class _Careful(Primer):
    name = "careful"

    def create(self, host: Host, *_: Any) -> PrimerDevice:
        return _Unhurried(host, memory=4096, vectors=1)


def lines(scale: float) -> Iterator[Line]:
    """Everything of this module."""
    result = asyncio.run(_layers(int(8 * scale)))
    yield Line("a mediated device's register by the backend, to calling its read", result.ratio("backend", "direct"))
    what = "the same, of a device that does not promise to be quick (a thread)"
    yield Line(what, result.ratio("thread", "direct"))
    with vfiod() as process:
        wire = process.connect()
        uuid = wire.command("mdev-create", parent="primer", type="primer-pci", parameters={"memory": 4096})["uuid"]
        wire.command("device_add", driver="vfio-pci", id="d0", mdev=uuid)
        arguments = {"device": "d0", "region": "bar0", "offset": 4, "size": 4}
        read = json.dumps({"execute": "region-read", "arguments": arguments}).encode()
        device = _opened()
        through = paired(
            {
                "vfiod": lambda: per_call(lambda: wire.call(read), 200),
                "trivial": lambda: per_call(lambda: wire.call(SMALL), 200),
                "direct": lambda: per_call(lambda: device.read(0, 4, 4), 200),
            },
            int(8 * scale),
        )
        device.close()
        wire.socket.close()
    yield Line("a mediated device's register through vfiod, to a direct call", through.ratio("vfiod", "direct"))
    yield Line("the same, to a trivial command", through.ratio("vfiod", "trivial"))


def _opened() -> PrimerDevice:
    class Nowhere:
        """No memory, nothing to watch: registers need neither."""

        def __getattr__(self, name: str) -> Any:
            raise AssertionError(name)

    device = PrimerDevice(Nowhere(), memory=4096, vectors=1)
    device.open()
    return device


async def _layers(rounds: int) -> Rounds:
    with ThreadPoolExecutor(2) as executor:
        bus = MdevBus(emit=lambda _: None, executor=executor, built_in={}, entry_points=None)
        devices = MediatedDevices(bus, lambda _: None, lambda _: None)
        bus.register(Primer())
        bus.register(_Careful())
        backends = {}
        for parent in ("primer", "careful"):
            uuid = await bus.create(parent, "primer-pci")
            backends[parent] = devices.open(uuid, parent, "vfio-pci")
        device = _opened()
        result = paired(
            {
                "direct": _timed(device.read),
                "backend": _timed(backends["primer"].region_read),
                "thread": _timed(backends["careful"].region_read),
            },
            rounds,
        )
        device.close()
        for backend in backends.values():
            backend.close()
        await bus.close()
    return result


def _timed(read: Callable[[int, int, int], bytes]) -> Callable[[], float]:
    return lambda: per_call(lambda: read(0, 4, 4), 500)
