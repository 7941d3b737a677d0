"""What the machine's devices can reach by DMA: one list of mappings, the same in every address space.

A mapping belongs to the machine. ``dma-map`` puts it into every address space there is, or into none; an address
space that comes later gets all of them before its device is used (:meth:`GuestMemory.attach`).

The methods that change something block in the kernel and are called in the ``topology`` lane, one at a time;
those that look are called on the loop at any time, and see a picture that was true at one moment.
"""

from __future__ import annotations

import logging
import mmap
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from vfiod.protocol.catalogue.memory import MappingInfo
from vfiod.protocol.catalogue.words import UNSET
from vfiod.protocol.errors import Busy, CommandError, InvalidArgument
from vfiod.protocol.limits import MAX_MAPPINGS
from vfiod.server.dma.ranges import words
from vfiod.server.dma.spaces import check_pages, check_range, check_reach, map_into, unmap_from

if TYPE_CHECKING:  # later: see Machine
    from vfiod.server.backends.base import AddressSpace, GuestFile, Mapping
    from vfiod.server.dma.clients import ClientMappings
    from vfiod.server.kernel.memory import SharedMemory
    from vfiod.server.state.fds import Given, Taken
    from vfiod.server.state.machine import MappingState

__all__ = ["GuestMemory", "MappedRange", "clip"]

_log: Final = logging.getLogger(__name__)

HOST_PAGE: Final = mmap.PAGESIZE


class MappedRange(Struct, frozen=True):
    """One mapping and where its memory came from.

    Attributes:
        mapping: what every address space has.
        backend: the id of the ``memory-backend-fd`` object; None: the mapping owns its memory.

    """

    mapping: Mapping
    backend: str | None

    @property
    def first(self) -> int:
        """The first address."""
        return self.mapping.iova

    @property
    def end(self) -> int:
        """The address after the last."""
        return self.mapping.iova + self.mapping.size


def clip(iova: int, size: int, page: int) -> tuple[int, int]:
    """The whole pages within a range, as QEMU's listener does: the start rounded up, the end down.

    Args:
        iova: first address, bytes.
        size: bytes.
        page: the IOMMU's smallest page size, a power of two, bytes.

    Returns the first address and the size, which is 0 when no whole page lies within.

    """
    first = (iova + page - 1) & -page
    end = (iova + size) & -page
    return first, max(0, end - first)


class GuestMemory:
    """All mappings of guest memory of one machine, lowest address first.

    Args:
        removed: called with IOVA, size and reason when a mapping was lost other than by :meth:`unmap`; in whatever
            thread that happened.

    """

    def __init__(self, removed: Callable[[int, int, str], None]) -> None:
        self._removed = removed
        self._ranges: list[MappedRange] = []  # sorted; changed in the topology lane, by single list operations
        self._spaces: tuple[AddressSpace, ...] = ()
        self._backends: dict[str, int] = {}
        self._bytes = 0
        self._clients: ClientMappings | None = None

    @property
    def clients(self) -> ClientMappings:
        """What clients of exports map besides, each in the address space of its device only."""
        if self._clients is None:
            from vfiod.server.dma.clients import ClientMappings  # with the first export

            self._clients = ClientMappings(self._overlapping, check_reach)
        return self._clients

    # --- looking: any thread, any time --------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._ranges)

    @property
    def spaces(self) -> tuple[AddressSpace, ...]:
        """The address spaces that have every mapping."""
        return self._spaces

    @property
    def mapped_bytes(self) -> int:
        """How much is mapped, in bytes; an address space pins as much."""
        return self._bytes

    @property
    def page_size(self) -> int:
        """What ranges are clipped to: the coarsest of the spaces' smallest page sizes, at least the host's. Bytes."""
        return max((HOST_PAGE, *(space.page_size for space in self._spaces)))

    def ranges(self) -> tuple[MappedRange, ...]:
        """Every mapping, lowest address first."""
        return tuple(self._ranges)

    def client_files(self) -> Iterator[SharedMemory]:
        """The files clients have mapped, for ``query-fds``."""
        return iter(()) if self._clients is None else iter(self._clients.files)

    def find(self, iova: int) -> MappedRange | None:
        """The mapping that holds an address; found by bisection."""
        at = bisect_right(self._ranges, iova, key=_first) - 1
        if at >= 0 and iova < self._ranges[at].end:
            return self._ranges[at]
        return None

    def uses(self, backend: str) -> int:
        """How many mappings take their memory from this object."""
        return self._backends.get(backend, 0)

    def infos(self) -> list[MappingInfo]:
        """What ``query-dma`` says."""
        return [
            MappingInfo(
                iova=one.mapping.iova,
                size=one.mapping.size,
                offset=one.mapping.offset,
                readonly=one.mapping.readonly,
                memory_backend=one.backend if one.backend is not None else UNSET,
            )
            for one in self.ranges()
        ] + ([] if self._clients is None else self._clients.infos())

    # --- mapping and unmapping: in the topology lane ----------------------------------------------------

    def map(
        self,
        iova: int,
        size: int,
        memory: GuestFile,
        *,
        offset: int = 0,
        readonly: bool = False,
        backend: str | None = None,
    ) -> tuple[int, int]:
        """Map a piece of memory into every address space, or into none.

        Args:
            iova: first address, bytes.
            size: bytes.
            memory: the file. Owned by the mapping from here on when ``backend`` is None and this succeeds.
            offset: where in the file, bytes.
            readonly: devices may read it, not write it. Memory that is read-only stays so.
            backend: the id of the object that owns the memory.

        Returns the address and size really mapped: clipped to whole pages.
        Raises InvalidArgument before anything is touched, or what the address space said, after all is undone.

        """
        page = self.page_size
        check_range(iova, size)
        if offset + size > memory.size:
            raise InvalidArgument(
                f"Parameter 'size': offset {offset:#x} plus size {size:#x} is beyond the memory's {memory.size:#x}"
            )
        if (iova - offset) % page:
            raise InvalidArgument(
                f"Parameter 'offset': IOVA {iova:#x} and offset {offset:#x} differ within a page of {page:#x} bytes;"
                " they must agree there"
            )
        first, length = clip(iova, size, page)
        if not length:
            raise InvalidArgument(_empty(iova, size, page))
        from vfiod.server.backends.base import Mapping

        mapping = Mapping(
            iova=first, size=length, memory=memory, offset=offset + first - iova, readonly=readonly or memory.readonly
        )
        at = self._room_for(mapping)
        if self._clients is not None:
            self._clients.check_free(first, length)
        for space in self._spaces:
            check_reach(space, mapping)
        done: list[AddressSpace] = []
        was_mapped = memory.is_mapped
        try:
            for space in self._spaces:
                map_into(space, mapping)
                done.append(space)
        except BaseException:
            for space in reversed(done):
                self._take_back(space, mapping)
            if not was_mapped:
                memory.unmap()
            raise
        self._ranges.insert(at, MappedRange(mapping, backend))
        self._bytes += length
        if backend is not None:
            self._backends[backend] = self._backends.get(backend, 0) + 1
        return first, length

    def unmap(self, iova: int, size: int) -> int:
        """Take a range back from every address space, or from none; it may hold several mappings, all of them whole.

        Returns the bytes that were unmapped: 0 when nothing was mapped there.
        Raises InvalidArgument for a range that would split a mapping or holds no whole page; or what an address
        space said, after everything is mapped again. A mapping that cannot be restored is removed everywhere,
        and ``removed`` is told.
        """
        page = self.page_size
        check_range(iova, size)
        first, length = clip(iova, size, page)
        if not length:
            raise InvalidArgument(_empty(iova, size, page))
        low, high = self._within(first, first + length)
        chosen = self._ranges[low:high]
        counting = None if self._clients is None else self._clients.counting(first, first + length)
        if counting is not None:
            raise Busy(f"{words(first, length)} is counted on by {counting.name}, which maps the same")
        done: list[tuple[AddressSpace, MappedRange]] = []
        try:
            for one in chosen:
                for space in self._spaces:
                    unmap_from(space, one.mapping)
                    done.append((space, one))
        except BaseException as error:
            self._restore(done, error)
            raise
        del self._ranges[low:high]
        for one in chosen:
            self._release(one)
        return sum(one.mapping.size for one in chosen)

    # --- address spaces: in the topology lane -----------------------------------------------------------

    def attach(self, space: AddressSpace) -> None:
        """Give a new address space every mapping there is. Failing, it has none of them, and is not ours.

        Raises InvalidArgument when a mapping cannot be in it (page size, addresses), or what the space said.
        """
        if any(one is space for one in self._spaces):
            return
        ranges = self.ranges()
        for one in ranges:
            check_pages(space, one.mapping)
            check_reach(space, one.mapping)
        done = 0
        fresh = [one.mapping.memory for one in ranges if not one.mapping.memory.is_mapped]
        try:
            for one in ranges:
                map_into(space, one.mapping)
                done += 1
        except BaseException:
            for one in reversed(ranges[:done]):
                self._take_back(space, one.mapping)
            for memory in fresh:
                memory.unmap()
            raise
        self._spaces = (*self._spaces, space)

    def adopt_space(self, space: AddressSpace) -> None:
        """Know an address space that has every mapping already: the kernel kept them while the process changed."""
        self._spaces = (*self._spaces, space)

    # --- over a change of the process ---------------------------------------------------------------------

    def mappings_of(self, space: AddressSpace) -> list[Mapping]:
        """All that is in an address space: the machine's mappings, and those of clients there."""
        own = [one.mapping for one in self._ranges]
        return own if self._clients is None else own + self._clients.mappings_of(space)

    def keep(self, given: Given) -> list[MappingState]:
        """Describe every mapping of the machine's own."""
        from vfiod.server.dma.files import keep_memory
        from vfiod.server.kernel.memory import SharedMemory
        from vfiod.server.state.machine import MappingState

        states = []
        for one in self.ranges():
            mapping, memory = one.mapping, one.mapping.memory
            states.append(
                MappingState(
                    iova=mapping.iova,
                    size=mapping.size,
                    offset=mapping.offset,
                    readonly=mapping.readonly,
                    backend=one.backend,
                    memory=keep_memory(memory, given)
                    if one.backend is None and isinstance(memory, SharedMemory)
                    else None,
                )
            )
        return states

    def adopt(self, states: list[MappingState], memory_of: Callable[[str], SharedMemory], taken: Taken) -> None:
        """Make the list of mappings again, before there is any address space.

        Args:
            states: what :meth:`keep` gave.
            memory_of: the memory of an object, by its id.
            taken: the fds.

        """
        from vfiod.server.backends.base import Mapping
        from vfiod.server.dma.files import take_memory

        for state in states:
            memory = memory_of(state.backend or "") if state.memory is None else take_memory(state.memory, taken)
            mapping = Mapping(state.iova, state.size, memory, state.offset, state.readonly)
            self._ranges.append(MappedRange(mapping, state.backend))
            self._bytes += state.size
            if state.backend is not None:
                self._backends[state.backend] = self._backends.get(state.backend, 0) + 1

    def detach(self, space: AddressSpace) -> None:
        """Forget an address space that is about to end, with all its mappings. One that is not ours is passed over."""
        self._spaces = tuple(one for one in self._spaces if one is not space)
        if self._clients is not None:
            self._clients.forget(space)
        if not self._spaces:  # nobody needs to find it by its address in this process
            for one in self._ranges:
                one.mapping.memory.unmap()

    def close(self) -> None:
        """Unmap everything and close the memory that mappings own. Never raises; failures are logged."""
        if self._clients is not None:
            self._clients.end()
        ranges, self._ranges = self._ranges, []
        for space in self._spaces:
            for one in ranges:
                self._take_back(space, one.mapping)
        self._spaces = ()
        for one in ranges:
            self._release(one)

    # --- inside -----------------------------------------------------------------------------------------

    def _overlapping(self, first: int, end: int) -> list[MappedRange]:
        """The mappings that have an address in [first, end)."""
        low = bisect_right(self._ranges, first, key=_first)
        if low and self._ranges[low - 1].end > first:
            low -= 1
        return self._ranges[low : bisect_left(self._ranges, end, key=_first)]

    def _room_for(self, mapping: Mapping) -> int:
        """Where the mapping goes in the list. Raises InvalidArgument for an overlap, CommandError when full."""
        if len(self._ranges) >= MAX_MAPPINGS:
            raise CommandError(f"This machine has {MAX_MAPPINGS} mappings, no more are allowed: dma-unmap some first")
        at = bisect_left(self._ranges, mapping.iova, key=_first)
        end = mapping.iova + mapping.size
        neighbours = self._ranges[max(0, at - 1) : at + 1]
        for one in neighbours:
            if one.first < end and mapping.iova < one.end:
                raise InvalidArgument(
                    f"Parameter 'iova': {words(mapping.iova, mapping.size)} overlaps the mapping"
                    f" {words(one.first, one.mapping.size)}; dma-unmap that first"
                )
        return at

    def _within(self, first: int, end: int) -> tuple[int, int]:
        """The part of the list that a range covers. Raises InvalidArgument when it would split a mapping."""
        low = bisect_right(self._ranges, first, key=_first)
        if low and self._ranges[low - 1].end > first:
            low -= 1
        high = bisect_left(self._ranges, end, key=_first)
        for one in self._ranges[low:high][:1] + self._ranges[low:high][-1:]:
            if one.first < first or one.end > end:
                raise InvalidArgument(
                    f"Parameter 'size': {words(first, end - first)} would split the mapping"
                    f" {words(one.first, one.mapping.size)}; unmap all of it or none"
                )
        return low, high

    def _release(self, one: MappedRange) -> None:
        self._bytes -= one.mapping.size
        if one.backend is None:
            try:
                one.mapping.memory.close()
            except BufferError:
                _log.error("%s is still being looked at; it stays open until that ends", one.mapping.memory.name)
        else:
            left = self._backends[one.backend] - 1
            if left:
                self._backends[one.backend] = left
            else:
                del self._backends[one.backend]

    def _take_back(self, space: AddressSpace, mapping: Mapping) -> None:
        try:
            unmap_from(space, mapping)
        except (CommandError, OSError) as error:
            _log.error("%s still has %s: %s", space.name, words(mapping.iova, mapping.size), error)

    def _restore(self, done: list[tuple[AddressSpace, MappedRange]], cause: BaseException) -> None:
        """Map again what was unmapped before something failed; a mapping for which that fails has to go for good."""
        lost: list[MappedRange] = []
        missing = list(done)
        for space, one in reversed(done):
            if one in lost:
                continue
            try:
                map_into(space, one.mapping)
            except (CommandError, OSError) as error:
                where = words(one.first, one.mapping.size)
                _log.error("%s could not be mapped again into %s: %s", where, space.name, error)
                lost.append(one)
            else:
                missing.remove((space, one))
        for one in lost:
            for space in self._spaces:
                if (space, one) not in missing:
                    self._take_back(space, one.mapping)
            del self._ranges[bisect_left(self._ranges, one.first, key=_first)]
            self._release(one)
            self._removed(one.first, one.mapping.size, f"It could not be restored after a failed dma-unmap: {cause}")


def _first(one: MappedRange) -> int:
    return one.mapping.iova


def _empty(iova: int, size: int, page: int) -> str:
    return f"Parameter 'size': the range is empty: no whole page of {page:#x} bytes lies within {words(iova, size)}"
