"""The messages of a platform device (extended IRQs, experimental): eventfds taken, messages read back, released whole.

What may happen when stands in :mod:`vfiod.server.interrupts.extended`; here it is done. A message is always direct:
the host's interrupt controller turns it into a signal of the caller's eventfd, and vfiod sleeps. Who programs the
device's sources with the messages is the caller: vfiod reports them, and knows no device's registers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from vfiod.protocol import vfio
from vfiod.protocol.catalogue.interrupts import IrqInfo, IrqMessage, VectorInfo
from vfiod.protocol.catalogue.words import UNSET, IrqMode
from vfiod.protocol.errors import CommandError, InvalidArgument, OperationFailed
from vfiod.protocol.fd import FileDescriptor, close_all
from vfiod.server.backends.base import Backend, FewerVectors
from vfiod.server.devices import eventfds
from vfiod.server.devices.irq_index import IrqIndex, Started, Wanted
from vfiod.server.interrupts.extended import Act, BlockRefused, MessageBlock

if TYPE_CHECKING:
    from vfiod.server.state.fds import Given, Place, Taken

__all__ = ["MESSAGES", "MessageIndex", "PlatformMessages"]

MESSAGES: Final = "x-msi"
"""The name of the index, wherever it stands: it is found by its type."""


class MessageIndex(IrqIndex, frozen=True):
    """The index that holds a platform device's messages."""

    @property
    def name(self) -> str:
        """As commands know it."""
        return MESSAGES

    @classmethod
    def matches(cls, info: vfio.IrqInfo) -> bool:
        """Whether an index holds messages."""
        return info.type is not None and info.type.type == vfio.IrqType.MSI


class PlatformMessages:
    """The messages of one device. Everything runs on the loop's thread, except :meth:`close`.

    Args:
        backend: where the device comes from.
        index: the index that holds them.

    """

    def __init__(self, backend: Backend, index: MessageIndex) -> None:
        self.index: Final = index
        self._backend = backend
        self._block = MessageBlock(index.index, index.info.count)
        self._triggers: list[FileDescriptor] = []
        self._numbers: dict[int, int] = {}

    # --- starting and stopping --------------------------------------------------------------------------

    def start(
        self, wanted: Sequence[Wanted], mode: IrqMode | None = None, numbers: Mapping[int, int] | None = None
    ) -> list[Started]:
        """Take a block of messages, or give one that was granted other eventfds.

        Args:
            wanted: vectors 0 to n - 1, in any order; their eventfds are owned, and closed on failure.
            mode: direct, or None.
            numbers: interrupt numbers of the machine, by vector.

        Returns:
            What was granted, which may be fewer than asked for, with their messages.

        Raises InvalidArgument, OperationFailed: then nothing has changed, or, when a granted block could not get its
        new eventfds, the whole block was released, and the error says so.

        """
        owned = [fd for want in wanted for fd in (want.trigger, want.resample) if fd is not None]
        try:
            ordered = self._checked(wanted, mode)
            had = len(self._triggers)
            triggers = [want.trigger or self._own(want.vector, owned) for want in ordered]
            replies = [
                None if want.trigger is not None else self._copy(fd, owned)
                for want, fd in zip(ordered, triggers, strict=True)
            ]
            self._carry_out(self._ask(len(ordered)), triggers)
        except BaseException:
            close_all(owned)
            raise
        granted = len(ordered) if had else len(self._block.messages)
        close_all(self._triggers[:granted])
        self._triggers[:granted] = triggers[:granted]
        close_all([*triggers[granted:], *(fd for fd in replies[granted:] if fd is not None)])
        self._numbers |= {vector: number for vector, number in (numbers or {}).items() if vector < granted}
        return [
            Started(
                self.index.index,
                vector,
                IrqMode.DIRECT,
                self._numbers.get(vector),
                trigger=replies[vector],
                message=self._block.messages[vector],
            )
            for vector in range(granted)
        ]

    def _checked(self, wanted: Sequence[Wanted], mode: IrqMode | None) -> list[Wanted]:
        self.index.check_start(wanted)
        if mode is IrqMode.RELAYED:
            raise InvalidArgument(f"{self.index} holds messages, which are direct: leave 'mode' out")
        ordered = sorted(wanted, key=lambda want: want.vector)
        if [want.vector for want in ordered] != list(range(len(ordered))):
            raise InvalidArgument(
                f"{self.index} gives messages as a block from vector 0 on: name 0 to {len(ordered) - 1}"
            )
        return ordered

    def _ask(self, count: int) -> Act:
        try:
            return self._block.ask(count)
        except BlockRefused as error:
            raise InvalidArgument(f"{self.index}: {error}") from error

    def stop(self, vectors: Sequence[int] | None = None) -> None:
        """Release the block, whole. With none it does nothing. InvalidArgument, OperationFailed; gone in any case."""
        if vectors is not None and set(vectors) != set(range(len(self._triggers))) and self._triggers:
            raise InvalidArgument(
                f"{self.index} releases its messages as the block they came as: leave 'vectors' out, or name "
                f"0 to {len(self._triggers) - 1}"
            )
        try:
            self._carry_out(self._block.release(), ())
        finally:
            self._forget()

    def _carry_out(self, act: Act, triggers: Sequence[FileDescriptor]) -> None:
        """Do what the block says until it rests. Raises what went wrong first."""
        block, index = self._block, self.index.index
        rebinding = bool(block.messages) and act is Act.SET
        wrong: CommandError | None = None
        while act is not Act.NOTHING:
            try:
                if act is Act.SET:
                    fds = tuple(fd.number for fd in triggers[: block.wanted])
                    self._backend.set_irqs(vfio.SetIrqs.eventfds(vfio.IrqAction.TRIGGER, index, fds))
                    act = block.done()
                elif act is Act.READ:
                    act, why = block.read(self._backend.irq_info(index))
                    if why:
                        wrong = OperationFailed("VFIO_DEVICE_GET_IRQ_INFO", str(self.index), errno="EPROTO", advice=why)
                else:
                    self._backend.set_irqs(vfio.SetIrqs.disable(index))
                    act = block.done()
            except FewerVectors as error:
                act = block.fewer(error.granted)
                # Asked again for fewer, it was no failure.
                wrong = wrong if act is Act.SET else wrong or error
            except CommandError as error:
                wrong = wrong or error
                act = block.failed()
        if wrong is None:
            return
        if rebinding:
            self._forget()
            raise OperationFailed(
                "VFIO_DEVICE_SET_IRQS",
                str(self.index),
                errno=wrong.errno or "EIO",
                advice=f"{wrong}; the block was released, for only some vectors had their new eventfd: irq-start again",
            ) from wrong
        raise wrong

    def _own(self, vector: int, owned: list[FileDescriptor]) -> FileDescriptor:
        """The eventfd it has, once more, or a new one."""
        if vector < len(self._triggers):
            return self._copy(self._triggers[vector], owned)
        owned.append(eventfds.make(str(self.index)))
        return owned[-1]

    def _copy(self, fd: FileDescriptor, owned: list[FileDescriptor]) -> FileDescriptor:
        owned.append(eventfds.duplicate(fd, str(self.index)))
        return owned[-1]

    def _forget(self) -> None:
        close_all(self._triggers)
        self._triggers = []
        self._numbers.clear()

    # --- the others ---------------------------------------------------------------------------------------

    def trigger(self, vector: int) -> None:
        """Make the device's driver signal a vector's eventfd. InvalidArgument, OperationFailed."""
        self._check_granted(vector)
        self._backend.set_irqs(vfio.SetIrqs.now(vfio.IrqAction.TRIGGER, self.index.index, vector))

    def route(self, vector: int, number: int | None) -> None:
        """Note which interrupt number of the machine a vector has; None: none. InvalidArgument."""
        self._check_granted(vector)
        self._numbers.pop(vector, None)
        if number is not None:
            self._numbers[vector] = number

    def _check_granted(self, vector: int) -> None:
        self.index.check_vector(vector)
        if vector >= len(self._triggers):
            raise InvalidArgument(f"Vector {vector} of {self.index.name} is not started: irq-start it first")

    def info(self) -> IrqInfo:
        """For ``query-irqs``: once a block was granted its count is that, and not what the device said before."""
        info, granted = self.index.info, self._block.messages
        return IrqInfo(
            device=self.index.device,
            index=self.index.index,
            name=self.index.name,
            count=len(granted) or info.count,
            active=bool(granted),
            flags=replace(self.index.flags, noresize=True),
            reserved=False,
            vectors=[
                VectorInfo(
                    vector=vector,
                    mode=IrqMode.DIRECT,
                    state="armed",
                    number=self._numbers.get(vector, UNSET),
                    fired=None,
                    delivered=None,
                    spurious=0,
                )
                for vector in range(len(granted))
            ],
            fired=None if granted else 0,
            delivered=None if granted else 0,
            spurious=0,
            x_messages=[IrqMessage(vector=at, address=one.address, data=one.data) for at, one in enumerate(granted)],
        )

    def fds(self) -> list[tuple[str, FileDescriptor]]:
        """Every eventfd, with a name that tells what it does."""
        return [(f"{self.index.name}{vector} trigger", fd) for vector, fd in enumerate(tuple(self._triggers))]

    def keep(self, owner: str, given: Given) -> tuple[list[Place], list[tuple[int, int]]]:
        """Describe the eventfds by vector, and the interrupt numbers."""
        triggers = [given.give(fd, f"{owner}/{MESSAGES}{vector}") for vector, fd in enumerate(self._triggers)]
        return triggers, list(self._numbers.items())

    def adopt(self, triggers: list[Place], numbers: list[tuple[int, int]], taken: Taken) -> None:
        """Have that again: the block stays granted, and the device says what its messages are. OperationFailed."""
        self._triggers = [taken.take(place) for place in triggers]
        self._numbers.update(numbers)
        if self._triggers:
            self._block.granted(self._backend.irq_info(self.index.index).messages[: len(self._triggers)])

    def close(self) -> None:
        """Release the block, whatever fails, and close every eventfd. May be called in a thread."""
        try:
            self._carry_out(self._block.release(), ())
        except CommandError:
            pass  # the device fd is closed next, and releases it
        finally:
            self._forget()
