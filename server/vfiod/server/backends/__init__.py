"""Where devices come from. ``base`` is what all of them offer; one module per origin beside it.

* ``group``: the kernel's groups and containers (``/dev/vfio/N``); ``container``, ``device``, ``checks`` are its parts.
* ``mediated``: devices made by a parent of :mod:`vfiod.server.mdev`.
* The kernel's cdev with iommufd, and vfio-user sockets, get modules of their own here.
"""
