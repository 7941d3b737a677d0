"""The way of an event alone: ``python -m tests.bench.publisher DIRECTORY``, in the place of bare pyzmq.

vfiod's hub and its socket of events in a process that does nothing else: nothing has to be started or shut down for an
event to be due. Each is new: it is numbered, stamped, encoded and published as any.
"""

from __future__ import annotations

import asyncio
import sys

import zmq

from vfiod.protocol.catalogue.mediated import MdevStarted
from vfiod.server.commands.table import TABLE
from vfiod.server.events import EventHub
from vfiod.server.kernel.kinds import kind_of
from vfiod.server.machine.root import Machine
from vfiod.server.monitor.bus import EventBus
from vfiod.server.monitor.bus_socket import Address
from vfiod.server.monitor.server import MonitorServer
from vfiod.server.sockets.access import Access


async def serve(directory: str, vm: str) -> None:
    """Emit as many as a call asks for, and answer it once they have been given to ZeroMQ."""
    loop = asyncio.get_running_loop()
    hub = EventHub(loop.call_later)
    server = MonitorServer(loop, Machine("vm0", hub=hub), hub, Access(), kind_of, TABLE)
    server.join_bus(EventBus(server, Address(path=f"{directory}/alone-events")))
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.bind(f"ipc://{directory}/alone")
        while True:
            peer, call = router.recv_multipart()
            for _ in range(int(call[1:])):
                hub.emit(MdevStarted(uuid=vm, vm=vm))
            await asyncio.sleep(0)
            router.send_multipart([peer, b""])


if __name__ == "__main__":
    asyncio.run(serve(*sys.argv[1:]))
