"""Memory that clients of exports map: per address space, owned, counted, and taken back when its last owner goes.

What ``dma-map`` maps belongs to the machine and is in every address space (:mod:`vfiod.server.dma.guest_memory`). What
a client maps is in the address space of its device alone, and in those of other devices only as far as they share that
space (one container, one IOAS). Two exports of one VM map the same RAM: in a space they share, a mapping that is the
same in every respect (address, size, file, offset, rights) is made once and counted; one that differs and overlaps is
EEXIST. A mapping goes when the last who counts it has unmapped it, or is gone.

A piece that comes without a file is memory only the client can reach. A mediated device asks the client for it, by
messages; for a device of the kernel it is kept as an entry that nothing stands behind: the IOMMU will refuse the
device's DMA there. (QEMU maps firmware and option ROMs so, whatever the guest's RAM is made of.)

What changes something blocks, and is called in the ``topology`` lane, one at a time.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

from vfiod.protocol.catalogue.memory import MappingInfo
from vfiod.protocol.errors import CommandError, InvalidArgument
from vfiod.protocol.fd import FileDescriptor
from vfiod.protocol.limits import MAX_MAPPINGS
from vfiod.server.backends.base import AddressSpace, GuestFile, Mapping
from vfiod.server.dma.client_files import ClientFiles, Unreachable
from vfiod.server.dma.client_ranges import ClientRange, RangeTable
from vfiod.server.dma.ranges import END_OF_SPACE, words
from vfiod.server.dma.spaces import failed

if TYPE_CHECKING:
    from vfiod.server.dma.guest_memory import MappedRange
    from vfiod.server.state.doors import ClientRangeState
    from vfiod.server.state.fds import Given, Taken

__all__ = ["Client", "ClientMappings"]

_log: Final = logging.getLogger(__name__)


class Client:
    """One client's hold on the memory of one address space. Made by :meth:`ClientMappings.join`.

    Attributes:
        name: for messages: ``export 'e0'``.
        mappings: how many it has.
        mapped_bytes: how much, in bytes.
        unreachable_bytes: how much of it came without a file: a device cannot reach it, or only by messages.

    """

    def __init__(self, name: str, table: RangeTable, all_clients: ClientMappings, remote: GuestFile | None) -> None:
        self.name = name
        self.mappings = 0
        self.mapped_bytes = 0
        self.unreachable_bytes = 0
        self._table = table
        self._clients = all_clients
        self._remote = remote
        self._left = False

    @property
    def by_messages(self) -> bool:
        """Whether any of it is reached by messages: it came without a file, and the device can ask for it."""
        return self._remote is not None and self.unreachable_bytes > 0

    @property
    def quick(self) -> bool:
        """Whether mapping and unmapping files in its address space waits for nobody: no pages are pinned."""
        return bool(getattr(self._table.space, "quick", False))

    def map(self, iova: int, size: int, fd: FileDescriptor | None, *, offset: int, readonly: bool) -> None:
        """Make a piece of the client's memory reachable for its device.

        Args:
            iova: first address, bytes; whole pages of the address space.
            size: bytes; whole pages.
            fd: the file it is in; taken over on every path. None: only the client can reach it.
            offset: where in the file, bytes; whole pages.
            readonly: the device may read it, not write it.

        Raises CommandError with an errno: EINVAL (the range, the file), EEXIST (it overlaps another mapping that is
        not the same), ENOSPC (too many), EACCES (the file may not be written), or what the address space said. Then
        nothing has changed.

        """
        try:
            self._check(iova, size, offset if fd is not None else 0)
            if fd is None:
                self._map_remote(iova, size, readonly)
            else:
                self._map_file(iova, size, fd, offset, readonly)
        finally:
            if fd is not None:
                fd.close()  # of a file that is new, a duplicate is kept
        self.mappings += 1
        self.mapped_bytes += size

    def unmap(self, iova: int, size: int) -> None:
        """Take back exactly what one :meth:`map` gave; when it returns, the device cannot reach it any more.

        (Unless another client of the same address space counts the same mapping.) Raises CommandError: ENOENT, this
        client has no such mapping; EINVAL, it has one there of another size; or what the space said, and then it is
        as it was.
        """
        one = self._table.exact(iova, size)
        if one is None or self not in one.owners:
            other = self._table.overlapping(iova, min(iova + max(size, 1), END_OF_SPACE))
            if other is None or self not in other.owners:
                raise InvalidArgument(f"{words(iova, size)} is not mapped by {self.name}", errno="ENOENT")
            raise InvalidArgument(
                f"{words(iova, size)} is not what {self.name} has mapped there, which is"
                f" {words(other.first, other.mapping.size)}: a mapping is taken back whole",
                errno="EINVAL",
            )
        self._drop(one)

    def unmap_all(self) -> None:
        """Take back everything. Raises what an address space said first, having gone on with the rest."""
        failure: CommandError | None = None
        for one in [one for one in self._table.ranges if self in one.owners]:
            try:
                self._drop(one)
            except CommandError as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def leave(self) -> None:
        """Take back everything, whatever fails, for good. Later calls do nothing."""
        if self._left:
            return
        self._left = True
        for one in [one for one in self._table.ranges if self in one.owners]:
            try:
                self._drop(one)
            except CommandError as error:
                _log.error("%s is gone, and its memory could not be taken back: %s", self.name, error)
                self._forget(one)
        self._clients.left(self, self._table)

    def adopt(self, state: ClientRangeState, fd: FileDescriptor | None) -> None:
        """Have a mapping again that another process made. The fd is taken over on every path. CommandError."""
        space = self._table.space
        # A device written in Python lives in this process: its space is as new. The kernel's has the mapping; so has
        # another program's, which is told nothing.
        fresh = bool(getattr(space, "by_messages", False))
        learn = space.map if fresh else getattr(space, "know", None)
        try:
            if fd is None:
                memory: GuestFile = self._remote or Unreachable(self.name)
                mapping = Mapping(state.iova, state.size, memory, state.iova, state.readonly)
                one = ClientRange(mapping, ("messages", self), [self], reachable=self._remote is not None)
                if one.reachable and learn is not None:
                    learn(mapping)
                self._table.insert(one)
                self.unreachable_bytes += state.size
            else:
                self._adopt_file(state, fd, learn)
        finally:
            if fd is not None:
                fd.close()
        self.mappings += 1
        self.mapped_bytes += state.size

    def _adopt_file(self, state: ClientRangeState, fd: FileDescriptor, learn: Callable[[Mapping], None] | None) -> None:
        status = os.fstat(fd.number)
        identity = ("file", status.st_dev, status.st_ino, state.offset, state.readonly)
        there = self._table.exact(state.iova, state.size)
        if there is not None and there.identity == identity:
            there.owners.append(self)
            return
        machine = self._clients.machine_range(state.iova, state.size) if state.by_machine else None
        if machine is not None:
            self._table.insert(ClientRange(machine.mapping, identity, [self], by_machine=True))
            return
        memory = self._clients.files.open(self.name, fd, state.readonly, state.offset + state.size)
        mapping = Mapping(state.iova, state.size, memory, state.offset, state.readonly)
        if learn is not None:
            learn(mapping)
        self._table.insert(ClientRange(mapping, identity, [self]))

    def ranges(self) -> Iterator[ClientRange]:
        """Its mappings, lowest address first."""
        return (one for one in tuple(self._table.ranges) if self in one.owners)

    # --- inside ---------------------------------------------------------------------------------------

    def _check(self, iova: int, size: int, offset: int) -> None:
        space = self._table.space
        if self._left:
            raise InvalidArgument(f"{self.name} is gone", errno="ENOTCONN")
        if size <= 0 or iova + size > END_OF_SPACE or offset + size > END_OF_SPACE >> 1:
            raise InvalidArgument(f"A mapping of {size:#x} bytes at {iova:#x} is not within 64 bits", errno="EINVAL")
        if (iova | size | offset) % space.page_size:
            raise InvalidArgument(
                f"{words(iova, size)} at offset {offset:#x} is not made of pages of {space.page_size:#x} bytes, "
                f"the smallest of {space.name}",
                errno="EINVAL",
            )
        if self.mappings >= MAX_MAPPINGS:
            raise InvalidArgument(f"{self.name} has {MAX_MAPPINGS} mappings, no more are allowed", errno="ENOSPC")

    def _map_remote(self, iova: int, size: int, readonly: bool) -> None:
        self._refuse_overlap(iova, size)
        memory = self._remote or Unreachable(self.name)
        # A device asks for it by its address: "where in the file" is the address itself.
        mapping = Mapping(iova, size, memory, iova, readonly)
        one = ClientRange(mapping, ("messages", self), [self], reachable=self._remote is not None)
        if one.reachable:
            self._clients.check_reach(self._table.space, mapping)
            self._table.space.map(mapping)
        self._table.insert(one)
        self.unreachable_bytes += size

    def _map_file(self, iova: int, size: int, fd: FileDescriptor, offset: int, readonly: bool) -> None:
        status = os.fstat(fd.number)
        identity = ("file", status.st_dev, status.st_ino, offset, readonly)
        there = self._table.exact(iova, size)
        if there is not None and there.identity == identity:
            if self in there.owners:
                raise self._exists(iova, size, there)
            there.owners.append(self)
            return
        self._refuse_overlap(iova, size)
        machine = self._clients.machine_range(iova, size)
        if machine is not None:
            self._count_machine(machine, identity, iova, size)
            return
        memory = self._clients.files.open(self.name, fd, readonly, offset + size)
        mapping = Mapping(iova, size, memory, offset, readonly)
        try:
            self._clients.check_reach(self._table.space, mapping)
            self._table.space.map(mapping)
        except BaseException:
            self._clients.files.close(memory)
            raise
        self._table.insert(ClientRange(mapping, identity, [self]))

    def _count_machine(self, machine: MappedRange, identity: tuple[object, ...], iova: int, size: int) -> None:
        """The machine maps something there: the same, and it is counted; or not, and it is refused."""
        mapping = machine.mapping
        status = os.fstat(mapping.memory.number)
        own = ("file", status.st_dev, status.st_ino, mapping.offset, mapping.readonly)
        if (mapping.iova, mapping.size, own) != (iova, size, identity):
            raise InvalidArgument(
                f"{words(iova, size)} overlaps {words(mapping.iova, mapping.size)}, which dma-map has "
                "mapped for the whole machine, and is not the same; dma-unmap that first",
                errno="EEXIST",
            )
        self._table.insert(ClientRange(mapping, identity, [self], by_machine=True))

    def _refuse_overlap(self, iova: int, size: int) -> None:
        there = self._table.overlapping(iova, iova + size)
        if there is not None:
            raise self._exists(iova, size, there)

    def _exists(self, iova: int, size: int, there: ClientRange) -> InvalidArgument:
        by = ", ".join(owner.name for owner in there.owners)
        return InvalidArgument(
            f"{words(iova, size)} overlaps {words(there.first, there.mapping.size)}, mapped by {by}",
            errno="EEXIST",
        )

    def _drop(self, one: ClientRange) -> None:
        """Count it no more; the last who did takes it out of the space."""
        if len(one.owners) == 1 and one.reachable and not one.by_machine:
            try:
                self._table.space.unmap(one.first, one.mapping.size)
            except OSError as error:
                raise failed("unmap", self._table.space, one.mapping, error) from error
        self._forget(one)

    def _forget(self, one: ClientRange) -> None:
        one.owners.remove(self)
        self.mappings -= 1
        self.mapped_bytes -= one.mapping.size
        if one.identity[0] == "messages":
            self.unreachable_bytes -= one.mapping.size
        if not one.owners:
            self._table.remove(one)
            if one.identity[0] == "file" and not one.by_machine:
                self._clients.files.close(one.mapping.memory)


class ClientMappings:
    """The mappings of all clients of one machine, by address space.

    Args:
        machine: the machine's own mappings that have an address in [first, end).
        check_reach: refuses a mapping an address space cannot translate.

    Attributes:
        files: of all clients, each open once.

    """

    def __init__(
        self,
        machine: Callable[[int, int], Sequence[MappedRange]],
        check_reach: Callable[[AddressSpace, Mapping], None],
    ) -> None:
        self._machine = machine
        self.check_reach = check_reach
        self._tables: dict[int, RangeTable] = {}  # by identity of the space
        self.files: Final = ClientFiles()
        self._clients: list[Client] = []

    # --- clients --------------------------------------------------------------------------------------

    def join(self, name: str, space: AddressSpace, remote: GuestFile | None) -> Client:
        """A client comes.

        Args:
            name: for messages.
            space: of its device.
            remote: memory that is asked for by messages, at addresses of the client's; None: the device cannot do
                that, what comes without a file is only noted.

        """
        table = self._tables.setdefault(id(space), RangeTable(space))
        client = Client(name, table, self, remote)
        self._clients.append(client)
        return client

    def left(self, client: Client, table: RangeTable) -> None:
        """A client has gone."""
        self._clients.remove(client)
        if not table.ranges and not any(other._table is table for other in self._clients):
            self._tables.pop(id(table.space), None)

    def clients(self) -> tuple[Client, ...]:
        """Those that are there."""
        return tuple(self._clients)

    # --- over a change of the process -------------------------------------------------------------------

    def keep(self, client: Client, given: Given) -> list[ClientRangeState]:
        """Describe what a client has mapped."""
        from vfiod.server.state.doors import ClientRangeState

        return [
            ClientRangeState(
                iova=one.mapping.iova,
                size=one.mapping.size,
                offset=one.mapping.offset,
                readonly=one.mapping.readonly,
                file=given.give(one.mapping.memory.number, one.mapping.memory.name)
                if one.identity[0] == "file"
                else None,
                by_machine=one.by_machine,
            )
            for one in client.ranges()
        ]

    def adopt(self, client: Client, states: Iterable[ClientRangeState], taken: Taken) -> None:
        """Have them again, for a client that has just joined. What the kernel has mapped it is not told again."""
        for state in states:
            client.adopt(state, None if state.file is None else taken.copy(state.file))

    # --- for the machine's own mappings -----------------------------------------------------------------

    def check_free(self, first: int, size: int) -> None:
        """Refuse a mapping for every address space where a client has something. InvalidArgument, EEXIST."""
        for table in self._tables.values():
            there = table.overlapping(first, first + size)
            if there is not None:
                raise InvalidArgument(
                    f"Parameter 'iova': {words(first, size)} overlaps"
                    f" {words(there.first, there.mapping.size)}, which is mapped by {there.owners[0].name}",
                    errno="EEXIST",
                )

    def counting(self, first: int, end: int) -> Client | None:
        """A client that counts on a mapping of the machine's in this range."""
        for table in self._tables.values():
            owner = table.counting(first, end)
            if owner is not None:
                return owner
        return None

    def forget(self, space: AddressSpace) -> None:
        """An address space ends, and with it all that is mapped there."""
        table = self._tables.pop(id(space), None)
        if table is None:
            return
        for one in tuple(table.ranges):
            for owner in tuple(one.owners):
                owner._forget(one)

    def machine_range(self, iova: int, size: int) -> MappedRange | None:
        """A mapping of the machine's that has an address in this range."""
        found = self._machine(iova, iova + size)
        return found[0] if found else None

    def mappings_of(self, space: AddressSpace) -> list[Mapping]:
        """What clients have in an address space that the machine has not."""
        table = self._tables.get(id(space))
        return [] if table is None else [one.mapping for one in table.ranges if one.reachable and not one.by_machine]

    def infos(self) -> list[MappingInfo]:
        """What ``query-dma`` says of them."""
        return [
            MappingInfo(
                iova=one.mapping.iova,
                size=one.mapping.size,
                offset=one.mapping.offset,
                readonly=one.mapping.readonly,
                address_space=table.space.name,
                clients=[owner.name for owner in one.owners],
            )
            for table in tuple(self._tables.values())
            for one in tuple(table.ranges)
        ]

    def end(self) -> None:
        """The machine ends: everything of every client goes."""
        for client in self.clients():
            client.leave()
