"""Where devices come from. ``base`` is what all of them offer; one module per origin beside it.

* ``group``: the kernel's groups and containers (``/dev/vfio/N``); ``container``, ``device``, ``checks`` are its parts.
* ``mediated``: devices made by a parent of :mod:`vfiod.server.mdev`.
* ``cdev``: the kernel's cdevs (``/dev/vfio/devices/vfioN``), bound to an iommufd; ``iommufd`` and ``cdev_origin``
  are its parts, ``device`` and ``checks`` are shared with groups.
* vfio-user sockets get a module of their own here.
"""
