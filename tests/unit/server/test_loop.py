"""The event loop: asyncio's promises, with our selector at work, as a plain one, and as Python has it."""

from __future__ import annotations

import asyncio
import contextvars
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from vfiod.server import loop as module
from vfiod.server.loop import Poller, new_loop

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "short": new_loop,
    "plain": lambda: asyncio.SelectorEventLoop(Poller()),
    "stock": asyncio.SelectorEventLoop,
}


@pytest.fixture(params=LOOPS)
def loop(request: pytest.FixtureRequest) -> Iterator[asyncio.AbstractEventLoop]:
    made = LOOPS[request.param]()
    yield made
    made.close()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    for each in (one, other):
        each.setblocking(False)
    with one, other:
        yield one, other


def run(loop: asyncio.AbstractEventLoop, seconds: float = 10) -> None:
    """Until somebody stops it; the guard is far longer than anything here takes."""
    guard = loop.call_later(seconds, loop.stop)
    loop.run_forever()
    assert not guard.cancelled() and guard.when() > loop.time()
    guard.cancel()


def test_this_python_has_the_short_way() -> None:
    made = new_loop()
    assert isinstance(made, asyncio.SelectorEventLoop)
    poller: Any = made
    assert poller._selector.loop is made
    made.close()
    assert made.is_closed()


def test_a_loop_that_is_made_otherwise_is_left_as_it_is() -> None:
    poller = Poller()
    with selectors.SelectSelector() as other:
        strange = asyncio.SelectorEventLoop(other)
        assert not module._fits(strange, poller)
        strange.close()
    poller.close()


def test_callbacks_keep_their_order(loop: asyncio.AbstractEventLoop) -> None:
    done: list[int] = []
    for number in range(5):
        loop.call_soon(done.append, number)
    loop.call_soon(lambda: loop.call_soon(loop.stop))
    loop.call_soon(done.append, 5)
    run(loop)
    assert done == list(range(6))


def test_timers_fire_in_their_order_and_not_too_early(loop: asyncio.AbstractEventLoop) -> None:
    done: list[tuple[int, float]] = []
    start = loop.time()

    def fired(milliseconds: int) -> None:
        done.append((milliseconds, loop.time() - start))

    for milliseconds in (30, 10, 20):
        loop.call_later(milliseconds / 1000, fired, milliseconds)
    loop.call_later(0.04, loop.stop)
    cancelled = loop.call_later(0.005, done.append, (0, 0))
    cancelled.cancel()
    run(loop)
    assert [ms for ms, _ in done] == [10, 20, 30]
    assert all(took >= ms / 1000 - 0.002 for ms, took in done)


def test_a_timer_made_or_moved_by_a_reader_is_heeded(
    loop: asyncio.AbstractEventLoop, pair: tuple[socket.socket, socket.socket]
) -> None:
    here, there = pair
    far = loop.call_later(1000, loop.stop)

    def readable() -> None:
        here.recv(10)
        far.cancel()
        loop.call_later(0.001, loop.stop)

    loop.add_reader(here, readable)
    there.send(b"x")
    start = time.monotonic()
    loop.run_forever()
    assert time.monotonic() - start < 100
    loop.remove_reader(here)


def test_timers_fire_while_events_never_end(loop: asyncio.AbstractEventLoop, pair: tuple[socket.socket, ...]) -> None:
    here, there = pair
    there.send(b"never read")
    heard: list[None] = []
    loop.add_reader(here, heard.append, None)
    loop.call_later(0.01, loop.stop)
    run(loop)
    assert heard
    loop.call_later(0, loop.stop)  # with a timer that is due at once, and none besides
    run(loop)
    loop.remove_reader(here)


def test_other_callbacks_run_while_events_never_end(
    loop: asyncio.AbstractEventLoop, pair: tuple[socket.socket, ...]
) -> None:
    here, there = pair
    there.send(b"never read")
    loop.add_reader(here, lambda: None)
    left = [100]

    def again() -> None:
        left[0] -= 1
        loop.call_soon(again if left[0] else loop.stop)

    loop.call_soon(again)
    run(loop)
    assert left == [0]
    loop.remove_reader(here)


def test_what_is_ready_comes_before_what_epoll_reports(
    loop: asyncio.AbstractEventLoop, pair: tuple[socket.socket, ...]
) -> None:
    here, there = pair
    there.send(b"x")
    done: list[str] = []
    loop.call_soon(done.append, "ready")
    loop.add_reader(here, done.append, "readable")
    loop.call_later(0.01, loop.stop)
    run(loop)
    assert done[:2] == ["ready", "readable"]
    loop.remove_reader(here)


def test_every_ready_fd_is_served_when_one_is_always_ready(loop: asyncio.AbstractEventLoop) -> None:
    pairs = [socket.socketpair() for _ in range(200)]  # more than one poll gives
    heard: set[int] = set()

    def readable(number: int) -> None:
        heard.add(number)  # and leaves it there
        if len(heard) == len(pairs):
            loop.stop()

    for number, (here, there) in enumerate(pairs):
        there.send(b"x")
        loop.add_reader(here, readable, number)
    run(loop)
    for here, there in pairs:
        loop.remove_reader(here)
        here.close()
        there.close()


def test_a_reader_and_a_writer_of_one_fd(loop: asyncio.AbstractEventLoop, pair: tuple[socket.socket, ...]) -> None:
    here, there = pair
    done: list[str] = []

    def readable() -> None:
        done.append(here.recv(10).decode())
        assert loop.remove_writer(here)  # it is ready in the same event, and must not be called now

    loop.add_reader(here, readable)
    loop.add_writer(here, done.append, "writable")
    there.send(b"read")
    loop.call_later(0.01, loop.stop)
    run(loop)
    assert done == ["read"]
    assert loop.remove_reader(here) and not loop.remove_reader(here)
    loop.add_writer(here, loop.stop)
    run(loop)
    loop.remove_writer(here)


def test_what_is_removed_by_another_callback_is_not_called(
    loop: asyncio.AbstractEventLoop,
) -> None:
    pairs = [socket.socketpair() for _ in range(2)]
    done: list[int] = []

    def readable(number: int) -> None:
        done.append(number)
        pairs[number][0].recv(10)
        other = pairs[1 - number][0]
        loop.remove_reader(other)
        # The same number, another callback: the event was not for this one.
        loop.add_reader(other, lambda: done.append(10))
        pairs[1 - number][0].recv(10)
        loop.call_soon(loop.stop)

    for number, (here, there) in enumerate(pairs):
        loop.add_reader(here, readable, number)
        there.send(b"x")
    run(loop)
    assert len(done) == 1
    for here, there in pairs:
        loop.remove_reader(here)
        here.close()
        there.close()


def test_an_error_goes_to_the_exception_handler_and_the_loop_goes_on(
    loop: asyncio.AbstractEventLoop, pair: tuple[socket.socket, ...]
) -> None:
    here, there = pair
    told: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: told.append(context))

    def readable() -> None:
        if here.recv(1) == b"2":
            loop.stop()
        raise LookupError("of the reader")

    loop.add_reader(here, readable)
    there.send(b"12")
    run(loop)
    assert [str(one["exception"]) for one in told] == ["of the reader"] * 2
    assert "readable" in told[0]["message"] and isinstance(told[0]["handle"], asyncio.Handle)
    loop.remove_reader(here)


def test_an_exit_ends_the_loop(loop: asyncio.AbstractEventLoop, pair: tuple[socket.socket, ...]) -> None:
    here, there = pair

    def readable() -> None:
        raise SystemExit(3)

    loop.add_reader(here, readable)
    there.send(b"x")
    with pytest.raises(SystemExit):
        run(loop)
    loop.remove_reader(here)


def test_callbacks_run_in_their_own_context(loop: asyncio.AbstractEventLoop, pair: tuple[socket.socket, ...]) -> None:
    here, there = pair
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="none")
    seen: list[str] = []

    def readable() -> None:
        seen.append(variable.get())
        variable.set("the reader's")
        here.recv(10)
        loop.call_soon(loop.stop)

    variable.set("when added")
    loop.add_reader(here, readable)
    variable.set("later")
    there.send(b"x")
    run(loop)
    assert seen == ["when added"]
    assert variable.get() == "later"
    loop.remove_reader(here)


def test_signals_other_threads_and_executors(loop: asyncio.AbstractEventLoop) -> None:
    async def work() -> tuple[str, int]:
        signalled: asyncio.Future[str] = loop.create_future()
        loop.add_signal_handler(signal.SIGUSR1, signalled.set_result, "signalled")
        os.kill(os.getpid(), signal.SIGUSR1)
        told: asyncio.Future[int] = loop.create_future()
        thread = threading.Thread(target=loop.call_soon_threadsafe, args=(told.set_result, 7))
        thread.start()
        assert await loop.run_in_executor(None, lambda: 5) == 5
        result = await signalled, await told
        thread.join()
        assert loop.remove_signal_handler(signal.SIGUSR1)
        return result

    assert loop.run_until_complete(asyncio.wait_for(work(), 10)) == ("signalled", 7)
    loop.run_until_complete(loop.shutdown_default_executor())


def test_a_task_is_cancelled_and_a_wait_times_out(loop: asyncio.AbstractEventLoop) -> None:
    async def work() -> str:
        task = asyncio.ensure_future(asyncio.sleep(100))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.sleep(100), 0.001)
        return "done"

    assert loop.run_until_complete(work()) == "done"


def test_sockets_of_asyncio_work(loop: asyncio.AbstractEventLoop, pair: tuple[socket.socket, ...]) -> None:
    here, there = pair

    async def echo() -> bytes:
        await loop.sock_sendall(there, b"x" * 3_000_000)
        return await loop.sock_recv(there, 10)

    async def both() -> bytes:
        echoing = asyncio.ensure_future(echo())
        got = 0
        while got < 3_000_000:
            got += len(await loop.sock_recv(here, 65536))
        await loop.sock_sendall(here, b"thanks")
        return await echoing

    assert loop.run_until_complete(asyncio.wait_for(both(), 60)) == b"thanks"


def test_debug_mode_times_callbacks_and_may_come_and_go(
    pair: tuple[socket.socket, ...], caplog: pytest.LogCaptureFixture
) -> None:
    loop = new_loop()
    loop.slow_callback_duration = 0
    here, there = pair

    def readable() -> None:
        here.recv(1)
        if loop.get_debug():
            loop.set_debug(False)
            loop.call_soon(loop.stop)
        else:
            loop.set_debug(True)

    loop.add_reader(here, readable)
    there.send(b"12")
    run(loop)
    assert any("Executing" in one.message and "readable" in one.message for one in caplog.records)
    loop.remove_reader(here)
    loop.close()


def test_nothing_to_do_is_no_wake_up() -> None:
    """A loop that waits for events alone sleeps in one system call, however long."""
    program = (
        "import asyncio, os, threading, time\n"
        "from vfiod.server.loop import new_loop\n"
        "loop = new_loop()\n"
        "loop.call_later(1000, print)\n"
        "polls = 0\n"
        "real = loop._selector._selector\n"
        "class Counting:\n"
        "    def __getattr__(self, name): return getattr(real, name)\n"
        "    def poll(self, *how):\n"
        "        global polls\n"
        "        polls += 1\n"
        "        return real.poll(*how)\n"
        "loop._selector._selector = Counting()\n"
        "threading.Timer(0.3, loop.call_soon_threadsafe, (loop.stop,)).start()\n"
        "loop.run_forever()\n"
        "print(polls)\n"
        "loop.close()\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["1"]
