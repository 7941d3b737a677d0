"""What is written of a machine while one of its mediated devices is at work."""

import asyncio
import errno
import socket

import pytest
from tests.unit.server.machine.conftest import World

from vfiod.protocol.errors import OperationFailed
from vfiod.server.mdev.parent import Saved
from vfiod.server.store.current import Current
from vfiod.server.store.fdstore import FdStore
from vfiod.server.store.places import Places
from vfiod.server.store.slots import Slots


def test_a_device_at_work_is_written_as_it_was_and_the_others_as_they_are() -> None:
    async def main() -> None:
        world = World()
        slots = Slots()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifier:
            current = Current(world.machine, FdStore(notifier, None), slots, Places(), "test")
            try:
                uuid = await world.add()
                [before] = current._described().machine.mdevs
                error = OSError(errno.EBUSY, "at work")

                def refuse() -> Saved:
                    raise error

                world.parent.made[uuid].save = refuse  # type: ignore[method-assign]
                await world.add("n1")
                told = current._described().machine.mdevs
                assert told[0] == before
                assert len(told) == 2
                assert current._timer is not None, "it is looked at again"
                error = OSError(errno.EIO, "broken")
                with pytest.raises(OperationFailed, match="broken"):
                    current._described()
            finally:
                current._unsubscribe()
                if current._timer is not None:
                    current._timer.cancel()
                slots.close()
                await world.end()

    asyncio.run(main())
