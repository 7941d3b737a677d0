"""``matrix``: a vfio-ap device of no hardware: what there is of its interface, to try managers with.

It has no regions. It can be reset; REQ asks for it back; CFG_CHG says that its adapters, domains or control domains
have changed: when its parameter file is written to, which holds them as ``/sys/.../matrix`` of the kernel's does::

    05.0004
    05.00ab

Source: ``Documentation/arch/s390/vfio-ap.rst``.
"""

from __future__ import annotations

import errno
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Final

from vfiod.protocol.catalogue.mediated import DeviceApi
from vfiod.protocol.fd import FileDescriptor
from vfiod.protocol.vfio import SetIrqs
from vfiod.protocol.vfio.ccw import VFIO_AP_NUM_IRQS, ApIrq
from vfiod.server.mdev.event_irqs import EventIrqs
from vfiod.server.mdev.parent import DeviceInfo, Host, IrqInfo, MdevType, MediatedDevice, Parent, RegionInfo

__all__ = ["Matrix", "MatrixDevice"]
