"""Everything one VM has: devices, objects, memory, groups, mediated devices, fd sets. Nothing of sockets.

* :mod:`~vfiod.server.machine.root`: :class:`Machine`, its queries and its end.
* :mod:`~vfiod.server.machine.lifecycle`: adding and removing devices.
* :mod:`~vfiod.server.machine.objects`: what ``object-add`` makes.
* :mod:`~vfiod.server.machine.ending`: how all of it ends.
* :mod:`~vfiod.server.machine.environment`: the event loop, as device models see it.
"""

from vfiod.server.machine.lifecycle import NewDevice
from vfiod.server.machine.root import Machine

__all__ = ["Machine", "NewDevice"]
