"""Guest memory: clipping, refusals before anything is touched, all address spaces or none, replay.

Rules are those of behaviour.md, section 2.
"""

import mmap
import os
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfiod.protocol.errors import CommandError, InvalidArgument, OperationFailed
from vfiod.protocol.fd import FileDescriptor
from vfiod.server.backends.base import Mapping
from vfiod.server.dma.guest_memory import GuestMemory, clip
from vfiod.server.kernel.memory import SharedMemory

PAGE = mmap.PAGESIZE
MiB = 1 << 20


class Space:
    """An address space that keeps what it is given, as strictly as type1 does, and fails when it is told to."""

    def __init__(self, name: str = "container:0", page_size: int = PAGE, ranges: tuple[tuple[int, int], ...] = ()):
        self.name = name
        self.page_size = page_size
        self._ranges = ranges
        self.mapped: dict[int, Mapping] = {}
        self.calls = 0
        self.fail_map_at: set[int] = set()
        self.fail_unmap_at: set[int] = set()

    def iova_ranges(self) -> tuple[tuple[int, int], ...]:
        return self._ranges

    def map(self, mapping: Mapping) -> None:
        self.calls += 1
        if mapping.iova in self.fail_map_at:
            raise OperationFailed("VFIO_IOMMU_MAP_DMA", f"{self.name}, IOVA {mapping.iova:#x}", errno="ENOMEM")
        assert not any(one.iova <= mapping.last and mapping.iova <= one.last for one in self.mapped.values())
        assert (mapping.iova | mapping.size | mapping.offset) % self.page_size == 0
        self.mapped[mapping.iova] = mapping

    def unmap(self, iova: int, size: int) -> None:
        self.calls += 1
        if iova in self.fail_unmap_at:
            raise OperationFailed("VFIO_IOMMU_UNMAP_DMA", f"{self.name}, IOVA {iova:#x}", errno="EINVAL")
        assert self.mapped.pop(iova).size == size

    def shape(self) -> list[tuple[int, int, int, bool]]:
        return [(one.iova, one.size, one.offset, one.readonly) for one in sorted(self.mapped.values(), key=_iova)]


def _iova(mapping: Mapping) -> int:
    return mapping.iova


class World:
    """Guest memory, and files to map; closed at the end."""

    def __init__(self) -> None:
        self.lost: list[tuple[int, int, str]] = []
        self.memory = GuestMemory(lambda iova, size, reason: self.lost.append((iova, size, reason)))
        self.files: list[SharedMemory] = []

    def file(self, size: int = MiB, *, readonly: bool = False) -> SharedMemory:
        number = os.memfd_create("test", os.MFD_CLOEXEC)
        os.ftruncate(number, size)
        memory = SharedMemory(FileDescriptor(number), readonly=readonly, name="test memory")
        self.files.append(memory)
        return memory

    def close(self) -> None:
        self.memory.close()
        for one in self.files:
            one.close()

    def shape(self) -> list[tuple[int, int, int, bool]]:
        return [
            (one.mapping.iova, one.mapping.size, one.mapping.offset, one.mapping.readonly)
            for one in self.memory.ranges()
        ]


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()


# --- clipping ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("iova", "size", "page", "expected"),
    [
        (0, 0x1000, 0x1000, (0, 0x1000)),
        (0x800, 0x2000, 0x1000, (0x1000, 0x1000)),
        (0x1000, 0x1800, 0x1000, (0x1000, 0x1000)),
        (0x1001, 0xFFE, 0x1000, (0x2000, 0)),
        (0x1000, 0xFFF, 0x1000, (0x1000, 0)),
        (0x1000, 0x20000, 0x10000, (0x10000, 0x10000)),
        ((1 << 64) - 0x1000, 0x1000, 0x1000, ((1 << 64) - 0x1000, 0x1000)),
    ],
)
def test_clipping_keeps_the_whole_pages_within(iova: int, size: int, page: int, expected: tuple[int, int]) -> None:
    assert clip(iova, size, page) == expected


@given(st.integers(0, 2**64 - 1), st.integers(1, 2**40), st.sampled_from([1 << 12, 1 << 16, 1 << 21]))
def test_what_is_clipped_is_the_largest_whole_part(iova: int, size: int, page: int) -> None:
    first, length = clip(iova, size, page)
    assert length % page == 0
    if length:
        assert first % page == 0
        assert iova <= first < iova + page
        assert iova + size - page < first + length <= iova + size
    else:
        assert -(-iova // page) * page + page > iova + size


def test_a_mapping_is_clipped_with_its_offset(world: World) -> None:
    space = Space()
    world.memory.attach(space)
    assert world.memory.map(0x10800, 0x3000, world.file(), offset=0x800) == (0x11000, 0x2000)
    assert space.shape() == [(0x11000, 0x2000, 0x1000, False)]


def test_the_coarsest_page_size_rules(world: World) -> None:
    fine, coarse = Space("container:0"), Space("container:1", 1 << 16)
    world.memory.attach(fine)
    world.memory.attach(coarse)
    assert world.memory.page_size == 1 << 16
    assert world.memory.map(0x1000, 0x2F000, world.file(), offset=0x1000) == (0x10000, 0x20000)
    assert fine.shape() == coarse.shape() == [(0x10000, 0x20000, 0x10000, False)]


# --- refused before anything is touched -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("iova", "size", "offset", "words"),
    [
        (0x10000, 0x1000, 0x800, "Parameter 'offset': IOVA 0x10000 and offset 0x800 differ within a page"),
        (0x10001, 0xFFF, 1, "Parameter 'size': the range is empty: no whole page"),
        (0x10000, 2 * MiB, 0, "Parameter 'size': offset 0x0 plus size 0x200000 is beyond the memory's 0x100000"),
        (0x10000, 0x1000, MiB, "Parameter 'size': offset 0x100000 plus size 0x1000 is beyond"),
        ((1 << 64) - 0x1000, 0x2000, 0, "Parameter 'size': IOVA 0xfffffffffffff000 plus size 0x2000 is beyond 64"),
        (0x200000, 0x1000, 0, "cannot translate 0x200000 to 0x200fff; it can do 0x0 to 0xfffff, 0x100000 to 0x1fffff"),
        (0xFF000, 0x2000, 0, "container:0 cannot translate 0xff000 to 0x100fff"),
        (0x20000, 0x3000, 0, "overlaps the mapping 0x22000 to 0x23fff; dma-unmap that first"),
        (0x22000, 0x2000, 0, "overlaps the mapping 0x22000 to 0x23fff"),
        (0x23000, 0x1000, 0, "overlaps the mapping 0x22000 to 0x23fff"),
        (0x21000, 0x8000, 0, "overlaps the mapping 0x22000 to 0x23fff"),
    ],
)
def test_bad_ranges_are_refused_before_any_call(world: World, iova: int, size: int, offset: int, words: str) -> None:
    space = Space(ranges=((0, 0xFFFFF), (0x100000, 0x1FFFFF)))
    world.memory.attach(space)
    world.memory.map(0x22000, 0x2000, world.file(), backend="m")
    space.calls = 0
    with pytest.raises(InvalidArgument, match=words):
        world.memory.map(iova, size, world.file(), offset=offset, backend="m")
    assert space.calls == 0
    assert world.memory.uses("m") == 1


def test_neighbours_may_touch(world: World) -> None:
    space = Space()
    world.memory.attach(space)
    for iova in (0x2000, 0x1000, 0x3000):
        world.memory.map(iova, 0x1000, world.file())
    assert [one.first for one in world.memory.ranges()] == [0x1000, 0x2000, 0x3000]


def test_the_very_last_page_of_64_bits_can_be_mapped(world: World) -> None:
    world.memory.attach(Space())
    top = (1 << 64) - PAGE
    assert world.memory.map(top, PAGE, world.file()) == (top, PAGE)
    assert world.memory.find((1 << 64) - 1) is not None
    assert world.memory.unmap(top, PAGE) == PAGE


def test_more_mappings_than_the_limit_are_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vfiod.server.dma.guest_memory.MAX_MAPPINGS", 2)
    file = world.file()
    world.memory.map(0, PAGE, file, backend="m")
    world.memory.map(PAGE, PAGE, file, backend="m")
    with pytest.raises(CommandError, match="This machine has 2 mappings, no more are allowed"):
        world.memory.map(2 * PAGE, PAGE, file, backend="m")


# --- all or none ----------------------------------------------------------------------------------------


def test_a_map_that_fails_in_one_space_is_in_none(world: World) -> None:
    spaces = [Space(f"container:{n}") for n in range(3)]
    for space in spaces:
        world.memory.attach(space)
    spaces[1].fail_map_at = {0x5000}
    with pytest.raises(OperationFailed, match=r"IOVA 0x5000 failed with ENOMEM"):
        world.memory.map(0x5000, PAGE, world.file(), backend="m")
    assert [space.shape() for space in spaces] == [[], [], []]
    assert world.shape() == []
    assert world.memory.mapped_bytes == 0
    assert world.memory.uses("m") == 0


def test_an_unmap_that_fails_in_one_space_restores_all(world: World) -> None:
    spaces = [Space(f"container:{n}") for n in range(3)]
    for space in spaces:
        world.memory.attach(space)
    file = world.file()
    world.memory.map(0x5000, PAGE, file, backend="m")
    world.memory.map(0x6000, PAGE, file, offset=PAGE, backend="m")
    before = world.shape()
    spaces[2].fail_unmap_at = {0x6000}
    with pytest.raises(OperationFailed, match="UNMAP_DMA"):
        world.memory.unmap(0x5000, 2 * PAGE)
    assert world.shape() == before
    assert all(space.shape() == before for space in spaces)
    assert world.lost == []


def test_what_cannot_be_restored_is_removed_everywhere_and_told(world: World) -> None:
    spaces = [Space(f"container:{n}") for n in range(2)]
    for space in spaces:
        world.memory.attach(space)
    own = world.file()
    world.memory.map(0x5000, PAGE, own)
    world.memory.map(0x7000, PAGE, world.file())
    spaces[1].fail_unmap_at = {0x7000}
    spaces[0].fail_map_at = {0x5000}
    with pytest.raises(OperationFailed, match="UNMAP_DMA"):
        world.memory.unmap(0x5000, 3 * PAGE)
    assert [(iova, size) for iova, size, _ in world.lost] == [(0x5000, PAGE)]
    assert "could not be restored" in world.lost[0][2]
    assert [one.first for one in world.memory.ranges()] == [0x7000]
    assert all([one[0] for one in space.shape()] == [0x7000] for space in spaces)
    assert own.closed
    spaces[1].fail_unmap_at = set()


# --- unmapping -------------------------------------------------------------------------------------------


def test_unmapping_covers_several_and_says_how_much(world: World) -> None:
    space = Space()
    world.memory.attach(space)
    files = [world.file() for _ in range(3)]
    for n, file in enumerate(files):
        world.memory.map(0x10000 * (n + 1), 2 * PAGE, file)
    assert world.memory.unmap(0x10000 - 0x800, 0x20000) == 4 * PAGE
    assert [one[0] for one in space.shape()] == [0x30000]
    assert [file.closed for file in files] == [True, True, False]


@pytest.mark.parametrize(("iova", "size"), [(0x11000, 0x1000), (0x10000, 0x1000), (0xF000, 0x2000), (0x11000, 0x9000)])
def test_unmapping_never_splits(world: World, iova: int, size: int) -> None:
    space = Space()
    world.memory.attach(space)
    world.memory.map(0x10000, 0x3000, world.file())
    with pytest.raises(InvalidArgument, match="would split the mapping 0x10000 to 0x12fff; unmap all of it or none"):
        world.memory.unmap(iova, size)
    assert space.shape() == world.shape() == [(0x10000, 0x3000, 0, False)]


def test_unmapping_nothing_is_zero_and_an_empty_range_is_said(world: World) -> None:
    assert world.memory.unmap(0x10000, 0x1000) == 0
    with pytest.raises(InvalidArgument, match="the range is empty: no whole page of 0x1000 bytes lies within"):
        world.memory.unmap(0x10001, 0x1000)


def test_what_was_mapped_in_odd_bounds_is_unmapped_by_the_same(world: World) -> None:
    world.memory.attach(Space())
    first, size = world.memory.map(0x10800, 0x3900, world.file(), offset=0x800)
    assert world.memory.unmap(0x10800, 0x3900) == size
    assert (first, size) == (0x11000, 0x3000)


# --- read-only, backends -----------------------------------------------------------------------------------


def test_readonly_stays_readonly(world: World) -> None:
    space = Space()
    world.memory.attach(space)
    world.memory.map(0x1000, PAGE, world.file(readonly=True))
    world.memory.map(0x2000, PAGE, world.file(), readonly=True)
    world.memory.map(0x3000, PAGE, world.file())
    assert [one[3] for one in space.shape()] == [True, True, False]
    assert [one.readonly for one in world.memory.infos()] == [True, True, False]


def test_a_backends_memory_outlives_its_mappings(world: World) -> None:
    file = world.file()
    world.memory.map(0x1000, PAGE, file, backend="ram0")
    world.memory.map(0x2000, PAGE, file, offset=PAGE, backend="ram0")
    assert world.memory.uses("ram0") == 2
    assert world.memory.unmap(0x1000, 2 * PAGE) == 2 * PAGE
    assert world.memory.uses("ram0") == 0
    assert not file.closed


# --- address spaces that come and go ---------------------------------------------------------------------------


def test_a_later_space_gets_everything_first(world: World) -> None:
    early, late = Space("container:0"), Space("mdev:x")
    world.memory.attach(early)
    for n in range(5):
        world.memory.map(n * 0x10000, 2 * PAGE, world.file(), readonly=n == 3)
    world.memory.attach(late)
    assert late.shape() == early.shape() == world.shape()
    assert [space.name for space in world.memory.spaces] == ["container:0", "mdev:x"]


def test_a_replay_that_fails_leaves_nothing(world: World) -> None:
    for n in range(5):
        world.memory.map(n * 0x10000, PAGE, world.file())
    space = Space()
    space.fail_map_at = {0x30000}
    with pytest.raises(OperationFailed, match="ENOMEM"):
        world.memory.attach(space)
    assert space.shape() == []
    assert world.memory.spaces == ()


def test_a_space_that_cannot_hold_what_there_is_is_refused_untouched(world: World) -> None:
    world.memory.map(0x1000, PAGE, world.file())
    coarse, narrow = Space("container:1", 1 << 16), Space("container:2", ranges=((0x10000, 0xFFFFF),))
    with pytest.raises(InvalidArgument, match="is not made of pages of 0x10000 bytes, the smallest of container:1"):
        world.memory.attach(coarse)
    with pytest.raises(InvalidArgument, match="container:2 cannot translate 0x1000 to 0x1fff"):
        world.memory.attach(narrow)
    assert (coarse.calls, narrow.calls, world.memory.spaces) == (0, 0, ())


def test_a_detached_space_is_left_alone(world: World) -> None:
    gone, stays = Space("container:0"), Space("container:1")
    world.memory.attach(gone)
    world.memory.attach(stays)
    world.memory.detach(gone)
    world.memory.detach(gone)
    world.memory.map(0x1000, PAGE, world.file())
    assert gone.calls == 0
    assert stays.shape() == [(0x1000, PAGE, 0, False)]


def test_closing_unmaps_and_closes_what_mappings_own(world: World) -> None:
    space = Space()
    world.memory.attach(space)
    own, lent = world.file(), world.file()
    world.memory.map(0x1000, PAGE, own)
    world.memory.map(0x2000, PAGE, lent, backend="m")
    space.fail_unmap_at = {0x1000}
    world.memory.close()
    assert [one[0] for one in space.shape()] == [0x1000]  # it refused, and nothing was raised
    assert own.closed
    assert not lent.closed
    assert len(world.memory) == 0


# --- a model ----------------------------------------------------------------------------------------------------

PAGES = 64


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["map", "unmap", "attach", "detach"]), st.integers(0, PAGES - 1), st.integers(1, 6)),
        max_size=60,
    )
)
def test_every_space_always_has_exactly_what_a_plain_model_has(steps: list[tuple[str, int, int]]) -> None:
    """The model is a set of ranges searched from end to end; all spaces and the list must agree with it."""
    with ExitStack() as stack:
        world = World()
        stack.callback(world.close)
        file = world.file(PAGES * PAGE)
        model: dict[int, int] = {}
        spaces: list[Space] = []
        for step, (what, page, count) in enumerate(steps):
            first, end = page, page + count
            touched = {one: model[one] for one in model if one < end and first < model[one]}
            if what == "map":
                fits = not touched and end <= PAGES
                try:
                    world.memory.map(first * PAGE, count * PAGE, file, offset=first * PAGE, backend="m")
                except InvalidArgument:
                    assert not fits
                else:
                    assert fits
                    model[first] = end
            elif what == "unmap":
                whole = all(first <= one and model[one] <= end for one in touched)
                try:
                    size = world.memory.unmap(first * PAGE, count * PAGE)
                except InvalidArgument:
                    assert not whole
                else:
                    assert whole
                    assert size == sum(model.pop(one) - one for one in touched) * PAGE
            elif what == "attach":
                spaces.append(Space(f"container:{step}"))
                world.memory.attach(spaces[-1])
            elif spaces:
                world.memory.detach(spaces.pop(page % len(spaces)))
            expected = [(one * PAGE, (model[one] - one) * PAGE, one * PAGE, False) for one in sorted(model)]
            assert world.shape() == expected
            assert all(space.shape() == expected for space in spaces)
            for one in range(PAGES):
                found = world.memory.find(one * PAGE + 5)
                holds = [first for first in model if first <= one < model[first]]
                assert (found.first // PAGE if found else None) == (holds[0] if holds else None)
            assert world.memory.mapped_bytes == sum(size for _, size, _, _ in expected)
            assert world.memory.uses("m") == len(model)
