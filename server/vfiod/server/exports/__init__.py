"""The hypervisor's door: devices offered by vfio-user on Unix sockets, one socket per device.

Source: QEMU ``docs/interop/vfio-user.rst``; what clients really send: ``hw/vfio-user`` of QEMU.
"""

from vfiod.server.exports.registry import Exports, NewExport, exports_of

__all__ = ["Exports", "NewExport", "exports_of"]
