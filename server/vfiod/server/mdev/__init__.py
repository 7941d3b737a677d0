"""Mediated devices in Python: the interface for parents, the bus that keeps them, and the built-in sample.

* :mod:`~vfiod.server.mdev.parent`: what one implements to make devices. Start here.
* :mod:`~vfiod.server.mdev.pci_irqs`: interrupts of a PCI device, as the kernel's vfio-pci does them, to build on.
* :mod:`~vfiod.server.mdev.samples.pci`: ``primer``, a complete small PCI device to read and to copy.
* :mod:`~vfiod.server.mdev.bus`: registration, creation, start, and the end of things.
"""
