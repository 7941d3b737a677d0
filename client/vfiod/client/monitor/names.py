"""Names that live in the server: ids of devices, objects, exports; fds; mediated devices."""

from __future__ import annotations

from typing import Final

from vfiod.client.methods.aio import AsyncMethods
from vfiod.protocol.errors import VfiodError

__all__ = ["LIVE_SECONDS", "live_names"]

LIVE_SECONDS: Final = 1.0
"""A completion waits no longer for the server."""


async def live_names(client: AsyncMethods, kind: str, *, oob: bool) -> list[str]:
    """Names of a kind that the server knows now; none when it does not tell in time.

    Args:
        client: connected.
        kind: as :class:`~vfiod.client.monitor.complete.Completion` has it.
        oob: ask ahead of whatever is waiting.

    """
    try:
        match kind:
            case "devices":
                return [device.id for device in await client.query_devices(oob=oob, timeout=LIVE_SECONDS)]
            case "objects":
                return [made.id for made in await client.query_objects(oob=oob, timeout=LIVE_SECONDS)]
            case "exports":
                return [export.id for export in await client.query_device_exports(oob=oob, timeout=LIVE_SECONDS)]
            case "fds":
                named = [fd.name for fd in await client.query_fds(oob=oob, timeout=LIVE_SECONDS)]
                sets = await client.query_fdsets(oob=oob, timeout=LIVE_SECONDS)
                return [n for n in named if isinstance(n, str)] + [f"/dev/fdset/{s.fdset_id}" for s in sets]
            case "traces":
                points = await client.trace_event_get_state(name="*", oob=oob, timeout=LIVE_SECONDS)
                return [point.name for point in points]
        types = await client.query_mdev_types(oob=oob, timeout=LIVE_SECONDS)
    except (VfiodError, ValueError):
        return []
    names = {
        "mdevs": [device.uuid for made in types for device in made.devices],
        "parents": sorted({made.parent for made in types}),
        "types": [made.type for made in types],
    }
    return names.get(kind, [])
