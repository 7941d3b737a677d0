"""Clients of a vfiod server, synchronous and asyncio, with the same names; and the ``vfiod`` program.

::

    from vfiod.client import Client

    with Client.connect("vm1.sock") as client:
        client.dma_map(iova=0, size=1 << 20, fd=guest_memory)        # the fd is lent
        with client.region_map(device="nic0", region="bar0") as bar: # the fds in a result are the caller's
            ...

* :class:`Client` (:mod:`~vfiod.client.sync`) and :class:`AsyncClient` (:mod:`~vfiod.client.aio`): the two skins over
  one session without I/O (:mod:`~vfiod.client.connection`). Every command of the catalogue is a method, with its types.
* :mod:`~vfiod.client.events`: what :meth:`Client.events` gives.
* :mod:`~vfiod.client.fds`: who owns the file descriptors that go out and come in.
* :mod:`~vfiod.client.errors`: what can go wrong.

Names are imported when first used: a program that waits synchronously never pays for asyncio.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from vfiod.client.aio import AsyncClient, AsyncEventStream
    from vfiod.client.connection import Dialect
    from vfiod.client.errors import (
        ClientError,
        ConnectFailed,
        ConnectionLost,
        ProtocolError,
        RemoteError,
        RequestTimedOut,
    )
    from vfiod.client.events import Event
    from vfiod.client.methods.values import IrqStartResult, RegionMapResult, StartedIrq, VectorFds
    from vfiod.client.sync import Client, EventStream
    from vfiod.protocol.fd import FileDescriptor

__all__ = [
    "Client",
    "AsyncClient",
    "EventStream",
    "AsyncEventStream",
    "Event",
    "Dialect",
    "FileDescriptor",
    "IrqStartResult",
    "RegionMapResult",
    "StartedIrq",
    "VectorFds",
    "ClientError",
    "ConnectFailed",
    "ConnectionLost",
    "ProtocolError",
    "RemoteError",
    "RequestTimedOut",
]

_HOMES: Final = {
    "Client": "vfiod.client.sync",
    "EventStream": "vfiod.client.sync",
    "AsyncClient": "vfiod.client.aio",
    "AsyncEventStream": "vfiod.client.aio",
    "Event": "vfiod.client.events",
    "Dialect": "vfiod.client.dialects",
    "FileDescriptor": "vfiod.protocol.fd",
    "IrqStartResult": "vfiod.client.methods.values",
    "RegionMapResult": "vfiod.client.methods.values",
    "StartedIrq": "vfiod.client.methods.values",
    "VectorFds": "vfiod.client.methods.values",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'vfiod.client' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, "vfiod.client.errors")), name)
