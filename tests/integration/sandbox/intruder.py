"""A parent that is an intruder: making a device is an attack, from inside a real server.

``mdev-create`` takes ``attack`` (a name of ``attacks``) and ``here`` (the directory of the server's sockets). What
became of it is in the error: ``outcome: done`` or ``outcome: EACCES``. Some end the process, and say nothing.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from typing import Any

import attacks  # type: ignore[import-not-found]  # beside this file, which is on the server's path and not the tests'

from vfiod.server.mdev.parent import DeviceApi, Host, MdevType
from vfiod.server.mdev.samples.pci import Primer, PrimerDevice


class Intruder(Primer):
    """As the primer, but for what it does first."""

    name = "intruder"
    types = (
        MdevType(
            id="intruder",
            name="Intruder",
            description="Attacks",
            device_api=DeviceApi.VFIO_PCI,
            max_instances=1,
            parameters={"attack": "its name", "here": "the directory of the sockets"},
        ),
    )

    def create(self, host: Host, uuid: str, mdev_type: MdevType, parameters: Mapping[str, Any]) -> PrimerDevice:
        """Attack."""
        attacks.HERE = parameters["here"]
        attacks.KEPT["program"] = -1
        # A terminal it can have, and the machine's own eventfds; no socket of the network.
        attacks.KEPT["terminal"] = os.openpty()[1]
        try:
            attacks.ATTACKS[parameters["attack"]]()
        except OSError as error:
            outcome = errno.errorcode[error.errno or 0]
        else:
            outcome = "done"
        raise OSError(errno.EINVAL, f"outcome: {outcome}")
