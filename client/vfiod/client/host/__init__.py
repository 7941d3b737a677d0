"""The manager's side: what this host has, in which groups, and giving devices to VFIO. Reads and writes sysfs only.

* :mod:`~vfiod.client.host.sysfs`: reading (``Documentation/ABI/testing/sysfs-bus-pci``, ``sysfs-kernel-iommu_groups``).
* :mod:`~vfiod.client.host.binding`: binding and unbinding by ``driver_override``, with a way back.
* :mod:`~vfiod.client.host.names`: names from ``pci.ids``.
* :mod:`~vfiod.client.host.program`: ``vfiod host``.
"""
