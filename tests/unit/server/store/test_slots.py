"""A text in shared memory, and its writer killed at every one of its writes."""

from __future__ import annotations

import contextlib
import os

import pytest

from vfiod.protocol.fd import FileDescriptor
from vfiod.server.store.slots import COUNT, SlotError, Slots


def again(slots: Slots) -> Slots:
    """As another process finds them."""
    return Slots([fd.duplicate() for fd in slots.files])


def test_the_last_text_is_found_by_whoever_comes() -> None:
    slots = Slots()
    assert slots.read() is None
    for text in (b"", b"one", b"x" * 100_000, b"short"):
        slots.write(text)
        other = again(slots)
        assert slots.read() == other.read() == text
        other.close()
    slots.clear()
    other = again(slots)
    assert other.read() is None
    other.write(b"anew")
    assert again_read(other) == b"anew"
    other.close()
    slots.close()


def again_read(slots: Slots) -> bytes | None:
    found = again(slots)
    try:
        return found.read()
    finally:
        found.close()


def test_a_writer_killed_at_any_write_leaves_the_old_text_or_the_new(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is gone after its Nth pwrite, which may have been cut short."""

    class Killed(BaseException):
        pass

    real = os.pwrite
    seen = set()
    for writes in range(4):
        for cut in (0, 1, 8, None):
            slots = Slots()
            slots.write(b"older")
            slots.write(b"old")
            left = [writes]

            def killed(fd: int, data: bytes, at: int, left: list[int] = left, cut: int | None = cut) -> int:
                if not left[0]:
                    real(fd, bytes(data)[:cut], at)
                    raise Killed
                left[0] -= 1
                return real(fd, data, at)

            monkeypatch.setattr(os, "pwrite", killed)
            with contextlib.suppress(Killed):
                slots.write(b"new, and longer")
            monkeypatch.setattr(os, "pwrite", real)
            found = again_read(slots)
            assert found in (b"old", b"new, and longer")
            seen.add(found)
            slots.write(b"and it goes on")
            assert again_read(slots) == b"and it goes on"
            slots.close()
    assert len(seen) == 2


def test_tries_are_counted_until_something_is_written() -> None:
    slots = Slots()
    assert slots.try_again() == 0
    slots.write(b"text")
    assert [slots.try_again(), slots.try_again()] == [1, 2]
    other = again(slots)
    assert other.try_again() == 3
    assert other.read() == b"text"
    other.write(b"it works")
    assert other.try_again() == 1
    other.close()
    slots.close()


def test_what_came_from_elsewhere_is_looked_at() -> None:
    with pytest.raises(SlotError, match="2 files, 1 came"):
        Slots([FileDescriptor(os.memfd_create("x"))])
    files = [FileDescriptor(os.memfd_create("x")) for _ in range(COUNT)]
    os.pwrite(files[0].number, b"vfiodst1" + b"\xff" * 4096, 0)
    slots = Slots(files)
    assert slots.read() is None
    slots.write(b"fine")
    assert slots.read() == b"fine"
    os.pwrite(files[0].number, b"\0", 4096)
    os.pwrite(files[1].number, b"\0", 4096)
    assert slots.read() is None, "a flipped byte is no text"
    slots.close()
