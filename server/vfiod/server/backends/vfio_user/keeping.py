"""A device that another program serves, over a change of the process: with its connection, or to be found again.

With the connection (a hand-over), the program notices nothing: at rest, with no request out, its socket is read and
written by the one process and then by the other. Without (a crash), what is known of the program is given to it again
once it is found, by its path.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Final

from msgspec.structs import replace

from vfiod.protocol import vfio
from vfiod.protocol.catalogue import EventData
from vfiod.protocol.errors import OperationFailed
from vfiod.protocol.fd import FileDescriptor
from vfiod.protocol.vfio_user import Agreement, Wire
from vfiod.server.backends.vfio_user.device import VfioUserBackend
from vfiod.server.backends.vfio_user.facts import Facts
from vfiod.server.backends.vfio_user.link import Link
from vfiod.server.backends.vfio_user.peer import Peer, _State
from vfiod.server.backends.vfio_user.seen import Seen
from vfiod.server.onloop import OnLoop
from vfiod.server.state.fds import Given, Taken
from vfiod.server.state.format import CannotKeep
from vfiod.server.state.machine import (
    AgreementState,
    BackendState,
    ConnectionState,
    ServedIrqState,
    ServedRegionState,
    ServedState,
)

__all__ = ["adopt_peer", "keep_backend", "seen_of"]

_STATES: Final = {_State.CONNECTED: "connected", _State.LOST: "lost", _State.ANOTHER: "another"}
_NAMES: Final = {name: state for state, name in _STATES.items()}


# --- describing: on the loop, nothing is changed ---------------------------------------------------------------


def keep_backend(backend: VfioUserBackend, given: Given) -> BackendState:
    """Describe it. CannotKeep: connections are not kept here, and it cannot be connected to again."""
    peer, seen = backend.peer, backend.seen
    if not given.connections:
        _check_found_again(peer)
    facts, agreement = peer.facts, peer.agreement
    owner = f"device:{peer.user}"
    state = peer._state
    link = peer._link if state is _State.CONNECTED and given.connections else None
    return BackendState(
        kind=backend.kind,
        name=backend.name,
        served=ServedState(
            path=peer.path,
            timeout_ms=peer._timeout_ms,
            reconnect_ms=peer._reconnect_ms,
            state=_STATES[state],
            reason=peer._reason,
            agreement=AgreementState(
                minor=agreement.minor,
                max_transfer=agreement.wire.max_transfer,
                send_fds=agreement.send_fds,
                dma_maps=agreement.dma_maps,
                page_size=agreement.page_size,
                multi=agreement.multi,
                twin=agreement.twin,
            ),
            flags=int(facts.info.flags),
            regions=[
                _keep_region(
                    one, facts.files.get(index) if given.connections else None, f"{owner}/region {index}", given
                )
                for index, one in enumerate(facts.regions)
            ],
            irqs=[_keep_irq(one) for one in facts.irqs],
            identity=facts.identity,
            config=bytes(seen.config),
            written=peer._config.keep(),
            rom=seen.rom,
            features=sorted(seen.features.items()),
            armed=peer._armed.keep(owner, given),
            masked=peer._armed.masked,
            connection=None if link is None else link.keep(given),
        ),
    )


def _check_found_again(peer: Peer) -> None:
    if peer.path is None:
        why = "its connection was passed (socket-fd) and ends with this process"
    elif not peer._reconnect_ms:
        why = "it is not to be connected to again (reconnect-ms is 0)"
    else:
        return
    raise CannotKeep(f"{peer.what} is a device of another program (vfio-user): {why}")


def _keep_region(
    one: vfio.RegionInfo | OperationFailed, file: FileDescriptor | None, name: str, given: Given
) -> ServedRegionState:
    if isinstance(one, OperationFailed):
        return ServedRegionState(info=b"", flags=0, errno=one.errno)
    return ServedRegionState(info=one.pack(), flags=int(one.flags), file=given.perhaps(file, name))


def _keep_irq(one: vfio.IrqInfo | OperationFailed) -> ServedIrqState:
    if isinstance(one, OperationFailed):
        return ServedIrqState(flags=0, count=0, errno=one.errno)
    return ServedIrqState(flags=int(one.flags), count=one.count)


# --- making it again: on the loop, nothing is said to the program ----------------------------------------------


def adopt_peer(
    state: ServedState,
    name: str,
    user: str,
    taken: Taken,
    *,
    connect: Callable[[], socket.socket],
    on_loop: OnLoop,
    executor: Executor,
    emit: Callable[[EventData], None],
) -> Peer:
    """The server again, as another process knew it. OSError, LookupError, OperationFailed.

    Without the connection it was known by, it is looked for at once.

    Args:
        state: what was described.
        name: of the server, for messages.
        user: of the device, for events.
        taken: the fds.
        connect: see :class:`Peer`, as the rest.
        on_loop: the machine's loop.
        executor: the machine's threads.
        emit: sends an event.

    """
    peer = Peer(
        connect,
        name,
        user,
        path=state.path,
        on_loop=on_loop,
        executor=executor,
        emit=emit,
        timeout_ms=state.timeout_ms,
        reconnect_ms=state.reconnect_ms,
    )
    agreed = state.agreement
    peer._agreement = Agreement(
        minor=agreed.minor,
        wire=Wire(agreed.max_transfer),
        send_fds=agreed.send_fds,
        dma_maps=agreed.dma_maps,
        page_size=agreed.page_size,
        multi=agreed.multi,
        twin=agreed.twin,
    )
    peer.facts = _facts(state, name, taken)
    try:
        peer._armed.adopt(state.armed, state.masked, taken)
    except BaseException:
        peer.facts.close()
        peer._armed.close()
        raise
    peer._config.adopt(state.written)
    known = _NAMES[state.state]
    if known is not _State.CONNECTED or state.connection is not None:
        peer._state, peer._reason = known, state.reason
        if state.connection is not None:
            peer._link = _link(peer, state.connection, taken)
            peer._watch(peer._link)
        else:
            peer._later()
    else:
        again = f"vfiod was started again after a crash, and tries to reach it every {state.reconnect_ms} ms"
        peer._reason = f"the connection to the server is gone: {again}"
        on_loop.soon(peer._begin_again)
    return peer


def _facts(state: ServedState, name: str, taken: Taken) -> Facts:
    regions: list[vfio.RegionInfo | OperationFailed] = []
    files: dict[int, FileDescriptor] = {}
    for index, one in enumerate(state.regions):
        if one.errno is not None:
            regions.append(OperationFailed("VFIO_USER_DEVICE_GET_REGION_INFO", name, errno=one.errno))
            continue
        regions.append(replace(vfio.RegionInfo.unpack(one.info), flags=vfio.RegionFlags(one.flags)))
        if one.file is not None:  # only with its connection: then this process ends if anything is missing
            files[index] = taken.take(one.file)
    irqs = tuple(
        vfio.IrqInfo(index, vfio.IrqFlags(one.flags), one.count)
        if one.errno is None
        else OperationFailed("VFIO_USER_DEVICE_GET_IRQ_INFO", name, errno=one.errno)
        for index, one in enumerate(state.irqs)
    )
    info = vfio.DeviceInfo(vfio.DeviceFlags(state.flags), len(regions), len(irqs))
    return Facts(info, tuple(regions), irqs, files, state.identity)


def _link(peer: Peer, state: ConnectionState, taken: Taken) -> Link:
    link = peer._new_link(_socket(taken.take(state.main.fd)))
    twin = None if state.twin is None else _socket(taken.take(state.twin.fd))
    link.adopt(peer.agreement.wire, state, twin, taken)
    return link


def _socket(fd: FileDescriptor) -> socket.socket:
    return socket.socket(fileno=fd.give_away())


def seen_of(state: ServedState) -> Seen:
    """What the device has shown of itself."""
    return Seen(state.config, dict(state.features), rom=state.rom)
