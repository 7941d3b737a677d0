"""Lanes: order, one at a time, and what happens when the caller or the lane goes away."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from vfiod.protocol.errors import Busy, CommandError, DeviceNotActive
from vfiod.server.lanes import Lane


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as executor:
        yield executor


def run(pool: ThreadPoolExecutor, scenario: Callable[[Lane], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        return await scenario(Lane("test", pool))

    return asyncio.run(main())


class Gate:
    """A blocking function that says when it began, and ends when it is told."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.go_on = threading.Event()

    def __call__(self) -> str:
        self.begun.set()
        self.go_on.wait()
        return "through"

    async def has_begun(self) -> None:
        await asyncio.to_thread(self.begun.wait)


def test_a_function_runs_in_a_thread_and_its_result_comes_back(pool: ThreadPoolExecutor) -> None:
    async def scenario(lane: Lane) -> int:
        return await lane.run("who", threading.get_ident)

    assert run(pool, scenario) != threading.get_ident()


def test_what_it_raises_comes_back_and_the_lane_goes_on(pool: ThreadPoolExecutor) -> None:
    async def scenario(lane: Lane) -> int:
        with pytest.raises(ZeroDivisionError):
            await lane.run("fail", lambda: 1 // 0)
        assert not lane.busy
        return await lane.run("work", lambda: 7)

    assert run(pool, scenario) == 7


def test_in_order_and_one_at_a_time(pool: ThreadPoolExecutor) -> None:
    order: list[int] = []
    inside = threading.Lock()

    def work(number: int) -> None:
        assert inside.acquire(blocking=False), "two functions of one lane run at once"
        order.append(number)
        inside.release()

    async def scenario(lane: Lane) -> None:
        await asyncio.gather(*(lane.run(str(n), lambda n=n: work(n)) for n in range(200)))  # type: ignore[misc]

    run(pool, scenario)
    assert order == list(range(200))


def test_it_says_what_runs_and_what_waits(pool: ThreadPoolExecutor) -> None:
    async def scenario(lane: Lane) -> None:
        assert (lane.busy, lane.waiting, lane.current, lane.pending()) == (False, 0, None, ())
        gate = Gate()
        first = asyncio.create_task(lane.run("reset", gate))
        second = asyncio.create_task(lane.run("irq-start", lambda: None))
        await gate.has_begun()
        assert (lane.busy, lane.waiting, lane.current) == (True, 1, "reset")
        assert lane.pending() == ("reset", "irq-start")
        gate.go_on.set()
        assert await first == "through"
        await second
        assert not lane.busy

    run(pool, scenario)


def test_a_turn_holds_the_lane_between_its_steps(pool: ThreadPoolExecutor) -> None:
    seen: list[str] = []

    async def scenario(lane: Lane) -> None:
        async def turn() -> None:
            async with lane.turn("two steps") as turn:
                await turn.run(lambda: seen.append("first"))
                await asyncio.sleep(0)
                await turn.run(lambda: seen.append("second"))

        await asyncio.gather(turn(), lane.run("other", lambda: seen.append("other")))

    run(pool, scenario)
    assert seen == ["first", "second", "other"]


def test_a_caller_cancelled_before_its_turn_never_runs(pool: ThreadPoolExecutor) -> None:
    ran: list[str] = []

    async def scenario(lane: Lane) -> None:
        gate = Gate()
        first = asyncio.create_task(lane.run("first", gate))
        gone = asyncio.create_task(lane.run("gone", lambda: ran.append("gone")))
        last = asyncio.create_task(lane.run("last", lambda: ran.append("last")))
        await gate.has_begun()
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        assert lane.pending() == ("first", "last")
        gate.go_on.set()
        await asyncio.gather(first, last)

    run(pool, scenario)
    assert ran == ["last"]


def test_a_caller_cancelled_at_work_keeps_the_lane_until_the_work_ends(pool: ThreadPoolExecutor) -> None:
    async def scenario(lane: Lane) -> None:
        gate = Gate()
        first = asyncio.create_task(lane.run("stuck", gate))
        await gate.has_begun()
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        assert lane.current == "stuck"
        after = asyncio.create_task(lane.run("after", gate.go_on.is_set))
        await asyncio.sleep(0)
        assert lane.waiting == 1
        gate.go_on.set()
        assert await after is True

    run(pool, scenario)


def test_cancelled_work_that_fails_disturbs_nobody(pool: ThreadPoolExecutor) -> None:
    async def scenario(lane: Lane) -> None:
        troubles: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: troubles.append(context))
        gate = Gate()

        def fail() -> None:
            gate()
            raise Busy("too late to tell")

        work = asyncio.create_task(lane.run("fails", fail))
        await gate.has_begun()
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        gate.go_on.set()
        await lane.idle()
        assert troubles == []

    run(pool, scenario)


def test_the_turn_in_which_the_caller_is_cancelled_at_once_is_passed_on(pool: ThreadPoolExecutor) -> None:
    async def scenario(lane: Lane) -> None:
        work = asyncio.create_task(lane.run("never", lambda: None))
        await asyncio.sleep(0)
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        assert await asyncio.wait_for(lane.run("next", lambda: 3), 10) == 3

    run(pool, scenario)


def test_closing_refuses_who_waits_and_who_comes_but_not_who_runs(pool: ThreadPoolExecutor) -> None:
    async def scenario(lane: Lane) -> None:
        gate = Gate()
        running = asyncio.create_task(lane.run("running", gate))
        waiting = asyncio.create_task(lane.run("waiting", lambda: None))
        await gate.has_begun()
        lane.close(DeviceNotActive("It is over", errno="ESHUTDOWN"))
        with pytest.raises(DeviceNotActive, match="It is over") as caught:
            await waiting
        assert caught.value.errno == "ESHUTDOWN"
        with pytest.raises(DeviceNotActive):
            await lane.run("late", lambda: None)
        assert lane.closed
        assert lane.busy
        gate.go_on.set()
        assert await running == "through"

    run(pool, scenario)


def test_refusals_are_separate_exceptions(pool: ThreadPoolExecutor) -> None:
    async def scenario(lane: Lane) -> None:
        refusal = CommandError("over")
        lane.close(refusal)
        caught = await asyncio.gather(*(lane.run("x", lambda: None) for _ in range(2)), return_exceptions=True)
        assert [str(one) for one in caught] == ["over", "over"]
        assert len({id(one) for one in (*caught, refusal)}) == 3

    run(pool, scenario)


def test_idle_is_told_once_nothing_waits(pool: ThreadPoolExecutor) -> None:
    idle: list[int] = []

    async def scenario(lane: Lane) -> None:
        lane.on_idle = lambda: idle.append(lane.waiting)
        await asyncio.gather(*(lane.run("x", lambda: None) for _ in range(5)))
        await lane.idle()

    run(pool, scenario)
    assert idle == [0]
