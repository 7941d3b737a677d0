"""What a server imports before its first request: nothing that only devices need."""

from __future__ import annotations

import subprocess
import sys

LATER = (
    "vfiod.protocol.drawing",
    "vfiod.protocol.introspection",
    "vfiod.protocol.vfio",
    "vfiod.protocol.vfio_user",
    "vfiod.server.backends.",
    "vfiod.server.commands.adding",
    "vfiod.server.devices.pci",
    "vfiod.server.exports",
    "vfiod.server.interrupts",
    "vfiod.server.machine.resets",
    "vfiod.server.mdev",
)

PROGRAM = """
import asyncio, sys
from vfiod.server.events import EventHub
from vfiod.server.program import Machine
async def start_and_end():
    machine = Machine("vm", hub=EventHub(asyncio.get_running_loop().call_later))
    machine.stats(), list(machine.fd_infos())
    await machine.close()
asyncio.run(start_and_end())
print(*sys.modules)
"""


def test_a_server_without_devices_imports_nothing_of_theirs() -> None:
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    modules = ran.stdout.split()
    assert "vfiod.server.machine.root" in modules
    assert [name for name in modules if name.startswith(LATER)] == []
