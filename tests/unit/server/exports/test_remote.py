"""Memory that is asked for by messages: the questions, and every kind of answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future

import pytest

from vfiod.protocol.errors import OperationFailed
from vfiod.protocol.vfio_user import DmaData, DmaRead, DmaWrite, DmaWritten, Payload
from vfiod.server.exports.remote import RemoteMemory


class Client:
    """A client with 64 KiB at address 0x1000, which takes 256 bytes at once; ``answer`` may say something else."""

    max_transfer = 256

    def __init__(self) -> None:
        self.memory = bytearray(range(256)) * 256
        self.asked: list[Payload] = []
        self.answer: Callable[[Payload], Payload] | None = None

    def ask(self, payload: Payload, answer: Future[Payload]) -> None:
        self.asked.append(payload)
        if self.answer is not None:
            answer.set_result(self.answer(payload))
        elif isinstance(payload, DmaRead):
            at = payload.address - 0x1000
            answer.set_result(DmaData(payload.address, bytes(self.memory[at : at + payload.count])))
        elif isinstance(payload, DmaWrite):
            at = payload.address - 0x1000
            self.memory[at : at + len(payload.data)] = payload.data
            answer.set_result(DmaWritten(payload.address, None))  # as QEMU: a header alone
        else:
            raise AssertionError(payload)

    def forget(self, answer: Future[Payload]) -> None:
        raise AssertionError("it answers at once")


def played(act: Callable[[RemoteMemory], None], client: Client | None = None) -> Client:
    """Let a device do something in a thread, as it does."""
    client = client or Client()

    async def scenario() -> None:
        memory = RemoteMemory("memory of e0", asyncio.get_running_loop(), client)
        await asyncio.to_thread(act, memory)

    asyncio.run(scenario())
    return client


def fails(errno: str, act: Callable[[RemoteMemory], object]) -> Callable[[RemoteMemory], None]:
    def checked(memory: RemoteMemory) -> None:
        with pytest.raises(OperationFailed, match="memory of e0") as caught:
            act(memory)
        assert caught.value.errno == errno

    return checked


def test_what_is_more_than_a_message_is_several() -> None:
    def act(memory: RemoteMemory) -> None:
        assert memory.read(0x1010, 600) == bytes(range(256))[0x10:] + bytes(range(256)) + bytes(range(104))
        memory.write(0x1100, b"x" * 300)

    client = played(act)
    assert [one.count for one in client.asked if isinstance(one, DmaRead)] == [256, 256, 88]
    assert [len(one.data) for one in client.asked if isinstance(one, DmaWrite)] == [256, 44]
    assert client.memory[0x100 : 0x100 + 301] == b"x" * 300 + bytes([0x2C])


@pytest.mark.parametrize(
    "answer",
    [
        lambda asked: DmaData(asked.address, b"short"),
        lambda asked: DmaData(asked.address + 1, bytes(16)),
        lambda asked: DmaData(asked.address, bytes(17)),
        lambda asked: DmaWritten(asked.address, 16),
    ],
)
def test_an_answer_to_something_else_is_no_data(answer: Callable[[Payload], Payload]) -> None:
    client = Client()
    client.answer = answer
    played(fails("EPROTO", lambda memory: memory.read(0x1000, 16)), client)


def test_less_written_than_sent_is_a_failure() -> None:
    client = Client()
    client.answer = lambda asked: DmaWritten(0x1000, 15)
    played(fails("EPROTO", lambda memory: memory.write(0x1000, bytes(16))), client)


def test_nobody_waits_on_the_loop() -> None:
    client = Client()

    async def scenario() -> None:
        memory = RemoteMemory("memory of e0", asyncio.get_running_loop(), client)
        fails("EDEADLK", lambda one: one.read(0x1000, 16))(memory)
        fails("EDEADLK", lambda one: one.write(0x1000, bytes(16)))(memory)

    asyncio.run(scenario())
    assert client.asked == []


def test_it_is_no_file_and_can_be_had_in_no_other_way() -> None:
    def act(memory: RemoteMemory) -> None:
        fails("ENOTSUP", lambda one: one.number)(memory)
        fails("ENOTSUP", lambda one: one.address())(memory)
        fails("ENOTSUP", lambda one: one.pin(0, 16, writable=True))(memory)
        assert memory.asks

    played(act)


def test_when_the_loop_has_ended_so_has_the_client() -> None:
    loop = asyncio.new_event_loop()
    made: list[RemoteMemory] = []
    loop.run_until_complete(asyncio.to_thread(lambda: made.append(RemoteMemory("memory of e0", loop, Client()))))
    loop.close()
    fails("ENOTCONN", lambda memory: memory.read(0x1000, 16))(made[0])
