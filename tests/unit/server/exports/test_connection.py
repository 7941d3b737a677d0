"""One connection: strictly in order, whatever waits; bounded, whoever does not read; ended once."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from vfiod.protocol.errors import InvalidArgument
from vfiod.protocol.limits import VFIO_USER_MAX_BACKLOG
from vfiod.protocol.vfio_user import OURS, Channel, Command, Failure, RegionData, RegionRead, Reply, Request, Version
from vfiod.server.exports.connection import DONE, Answer, Connection


class Both:
    """Both ends: a connection, and a client that speaks to it."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        mine, theirs = socket.socketpair()
        mine.setblocking(False)
        theirs.setblocking(False)
        self.client = theirs
        self.channel = Channel.client()
        self.executed: list[int] = []  # offsets of REGION_READs, in order
        self.reasons: list[str] = []
        self.waits: dict[int, asyncio.Future[None]] = {}  # by offset
        self.fast: Callable[[bytearray, int], bytes | None] = lambda data, size: None
        self.connection = Connection(
            self.loop,
            mine,
            execute=self.execute,
            fast=lambda data, size: self.fast(data, size),
            ended=self.reasons.append,
        )
        self.connection.start()

    def execute(self, request: Request) -> Answer | Awaitable[Answer]:
        if request.command is Command.VERSION:
            return Answer(Version(0, 0, OURS))
        asked = request.payload
        assert isinstance(asked, RegionRead)
        if asked.region:
            raise InvalidArgument("there is region 0 only")
        waits = self.waits.get(asked.offset)
        return self.read(asked, waits)

    def read(self, asked: RegionRead, waits: asyncio.Future[None] | None) -> Answer | Awaitable[Answer]:
        answer = Answer(RegionData(0, asked.offset, bytes(asked.count)))
        if waits is None:
            self.executed.append(asked.offset)
            return answer

        async def later() -> Answer:
            await waits
            self.executed.append(asked.offset)
            return answer

        return later()

    async def greet(self) -> None:
        await self.send(self.channel.request(Version(0, 0, OURS))[1].data)
        await self.replies(1)

    async def send(self, data: bytes) -> None:
        await self.loop.sock_sendall(self.client, data)

    def ask(self, *offsets: int, region: int = 0, count: int = 4) -> bytes:
        return b"".join(self.channel.request(RegionRead(region, at, count))[1].data for at in offsets)

    async def replies(self, many: int) -> list[Any]:
        got: list[Any] = []
        while len(got) < many:
            data = await asyncio.wait_for(self.loop.sock_recv(self.client, 1 << 20), 60)
            assert data, self.reasons
            got += self.channel.receive(data)
        return got

    async def turns(self, check: Callable[[], bool]) -> None:
        for _ in range(10_000):
            if check():
                return
            await asyncio.sleep(0)
        raise AssertionError("it never was so")

    async def close(self) -> None:
        self.client.close()
        self.connection.end("the test is over")
        await self.connection.settled()


def play(scenario: Callable[[Both], Coroutine[Any, Any, None]]) -> None:
    async def whole() -> None:
        both = Both()
        await both.greet()
        try:
            await scenario(both)
        finally:
            await both.close()

    asyncio.run(whole())


def test_one_that_waits_keeps_those_behind_it_waiting() -> None:
    async def scenario(both: Both) -> None:
        both.waits[8] = both.loop.create_future()
        await both.send(both.ask(0, 8, 16, 24))
        [first] = await both.replies(1)
        assert isinstance(first, Reply) and both.executed == [0]
        await both.turns(lambda: both.connection.requests == 3)
        assert both.executed == [0]
        both.waits[8].set_result(None)
        await both.replies(3)
        assert both.executed == [0, 8, 16, 24]
        assert (both.connection.requests, both.connection.errors) == (5, 0)

    play(scenario)


def test_a_refusal_is_a_reply_in_its_place() -> None:
    async def scenario(both: Both) -> None:
        await both.send(both.ask(0) + both.ask(4, region=1) + both.ask(8))
        replies = await both.replies(3)
        assert [type(one) for one in replies] == [Reply, Failure, Reply]
        assert replies[1].errno == "EINVAL"
        assert both.connection.errors == 1

    play(scenario)


def test_the_fast_way_is_tried_only_when_nothing_is_under_way() -> None:
    async def scenario(both: Both) -> None:
        tried: list[int] = []

        def fast(data: bytearray, size: int) -> bytes | None:
            tried.append(size)
            return None

        both.fast = fast
        both.waits[0] = both.loop.create_future()
        await both.send(both.ask(0))
        await both.turns(lambda: bool(tried))
        await both.send(both.ask(4))
        await both.send(both.ask(8)[:20])
        await both.turns(lambda: both.connection.channel.cut_short == 20)
        assert tried == [32], "neither behind one that waits, nor in the middle of a message"
        both.waits[0].set_result(None)
        await both.replies(2)

    play(scenario)


def test_who_does_not_read_is_not_read() -> None:
    async def scenario(both: Both) -> None:
        each = 1 << 16
        many = 8 * VFIO_USER_MAX_BACKLOG // each
        for at in range(many):
            await both.send(both.ask(at * each, count=each))
        await both.turns(lambda: len(both.executed) > 2)
        for _ in range(200):
            await asyncio.sleep(0)
        stopped = len(both.executed)
        assert stopped < many
        assert stopped * each <= VFIO_USER_MAX_BACKLOG + (1 << 20), "what the kernel holds, and the limit"
        assert len(await both.replies(many)) == many, "and then all come, none lost"

    play(scenario)


def test_the_end_is_told_once_and_drops_what_was_queued() -> None:
    async def scenario(both: Both) -> None:
        both.waits[0] = both.loop.create_future()
        await both.send(both.ask(0, 4, 8))
        await both.turns(lambda: both.connection.requests == 2)
        both.client.close()
        await both.turns(lambda: bool(both.reasons))
        assert both.reasons == ["The client has closed the connection"]
        assert not both.connection.open and both.connection.fileno() == -1
        both.waits[0].set_result(None)
        await both.connection.settled()
        assert both.executed == [0], "what was begun is finished, the rest never was"
        both.connection.end("again")
        await asyncio.sleep(0)
        assert len(both.reasons) == 1

    play(scenario)


@pytest.mark.parametrize("cut", [1, 15, 16, 31])
def test_bytes_that_are_missing_are_counted(cut: int) -> None:
    async def scenario(both: Both) -> None:
        await both.send(both.ask(0)[:cut])
        await both.turns(lambda: both.connection.channel.cut_short == cut)
        both.client.close()
        await both.turns(lambda: bool(both.reasons))
        assert both.reasons == [f"The client has closed the connection, {cut} bytes into a message"]

    play(scenario)


def test_parting_says_what_is_to_be_said_and_executes_nothing_more() -> None:
    async def scenario(both: Both) -> None:
        both.connection.part("there is no agreement")
        await both.turns(lambda: bool(both.reasons))
        assert both.reasons == ["there is no agreement"]
        assert await asyncio.wait_for(both.loop.sock_recv(both.client, 16), 60) == b""

    play(scenario)


def test_done_is_a_header_alone() -> None:
    assert DONE.payload is None and DONE.fds == ()
