"""Devices that other programs serve, by vfio-user: to a device model they look like the kernel's vfio.

::

    source ── opens ──► device (Backend) ──► peer: connects, again and again if wanted; replays ──► link: one socket
                        space (AddressSpace) ─┘
"""
