"""Follows the servers, reads the keyboard, draws."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import termios
import time
import tty
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn, TypeAlias

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from vfiod.client.errors import ClientError, RequestTimedOut
from vfiod.client.watch.draw import everything, screen
from vfiod.client.watch.picture import Picture
from vfiod.client.watch.view import View, keys_of
from vfiod.protocol.catalogue.devices import TopologyFormat
from vfiod.protocol.errors import RemoteError, VfiodError

if TYPE_CHECKING:
    from vfiod.client.aio import AsyncClient
    from vfiod.client.monitor.overbus import BusClient

__all__ = ["ANSWER_SECONDS", "Watch", "once", "sockets_in"]

RECONNECT_SECONDS: Final = (0.1, 0.5, 1.0, 2.0)  # the last for ever
ANSWER_SECONDS: Final = 10.0
"""A server that does not answer for so long is shown as a problem, not waited for in silence."""

SCAN_SECONDS: Final = 2.0
"""Between two looks for new sockets in a directory."""

FASTEST_SECONDS: Final = 0.05
"""Between two drawings: what comes faster nobody sees."""


Connect: TypeAlias = "Callable[[str], Awaitable[AsyncClient | BusClient]]"


async def once(paths: list[str], connect: Connect, console: Console, *, topology: bool, seconds: float) -> int:
    """Print one picture of each server. 0; 1 when one could not be asked."""
    status = 0
    for path in paths:
        picture = Picture(path)
        try:
            async with await connect(path) as client:
                await _look(client, picture, topology=topology)
                if seconds:  # rates need two looks
                    await asyncio.sleep(seconds)
                    await _look(client, picture, topology=topology)
        except VfiodError as error:
            print(f"vfiod watch: {error}", file=sys.stderr)
            status = 1
            continue
        for line in everything(picture, console.width, plain=_is_plain(console)):
            console.print(line, no_wrap=True, overflow="ignore", crop=False)
        if topology:
            console.print(Text("\nTopology", style="bold"))
            console.print(Text(picture.topology), no_wrap=True, overflow="ignore", crop=False)
    return status


async def _look(client: AsyncClient | BusClient, picture: Picture, *, topology: bool) -> None:
    """One look at everything."""
    oob = client.version is not None  # so that slow work does not stop the picture
    machine = await client.query_machine(oob=oob, timeout=ANSWER_SECONDS)
    with contextlib.suppress(RemoteError):  # an older server
        picture.exports = await client.query_device_exports(oob=oob, timeout=ANSWER_SECONDS)
    if topology:
        with contextlib.suppress(RemoteError):
            drawn = await client.query_topology(format=TopologyFormat.TREE, oob=oob, timeout=ANSWER_SECONDS)
            picture.topology = drawn.text if isinstance(drawn.text, str) else ""
    picture.update(machine, time.monotonic())


class Watch:
    """The moving picture of some servers.

    Args:
        paths: where they listen.
        find: looks for more, again and again; None: these are all.
        connect: makes a connection to one.
        interval: seconds between two looks.
        console: where to draw.

    """

    def __init__(
        self,
        paths: list[str],
        find: Callable[[], list[str]] | None,
        connect: Connect,
        interval: float,
        console: Console,
    ) -> None:
        self._paths = paths
        self._find = find
        self._connect = connect
        self._interval = interval
        self._console = console
        self._pictures: list[Picture] = []
        self._view = View()
        self._changed = asyncio.Event()
        self._awake = asyncio.Event()
        self._awake.set()

    async def run(self) -> None:
        """Until the person leaves. Raises ClientError when the only server is not there to begin with."""
        if self._find is None and len(self._paths) == 1:
            await (await self._connect(self._paths[0])).close()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, self._press, "q")
        loop.add_signal_handler(signal.SIGTERM, self._press, "q")
        loop.add_signal_handler(signal.SIGWINCH, self._changed.set)
        try:
            async with asyncio.TaskGroup() as tasks:
                await self._until_left(loop, tasks)
        except asyncio.CancelledError:
            if not self._view.leaving:
                raise

    async def _until_left(self, loop: asyncio.AbstractEventLoop, tasks: asyncio.TaskGroup) -> NoReturn:
        tasks.create_task(self._find_more(tasks))
        with self._keyboard(loop), self._screen() as live:
            await self._draw(live)
        raise asyncio.CancelledError  # so that the group ends everything else

    def _screen(self) -> Live:
        return Live(console=self._console, screen=True, auto_refresh=False, redirect_stdout=False)

    async def _draw(self, live: Live) -> None:
        while not self._view.leaving:
            self._changed.clear()
            pictures = self._pictures or [Picture("nobody there yet")]
            size = self._console.size
            lines = screen(pictures, self._view, size.width, size.height, plain=_is_plain(self._console))
            live.update(Group(*lines), refresh=True)
            await asyncio.sleep(FASTEST_SECONDS)
            await self._changed.wait()

    # --- the servers ------------------------------------------------------------------------------------------------

    async def _find_more(self, tasks: asyncio.TaskGroup) -> None:
        known: set[str] = set()
        while True:
            found = self._paths if self._find is None else self._find()
            for path in found:
                if path not in known:
                    known.add(path)
                    picture = Picture(path)
                    self._pictures.append(picture)
                    tasks.create_task(self._follow(picture))
            self._changed.set()
            if self._find is None:
                return
            await asyncio.sleep(SCAN_SECONDS)

    async def _follow(self, picture: Picture) -> None:
        attempt = 0
        while True:
            try:
                client = await self._connect(picture.path)
                async with client:
                    attempt = 0
                    await self._look_again_and_again(client, picture)
            except ClientError as error:
                picture.problem = f"{error}; trying again"
            except RemoteError as error:
                picture.problem = f"{picture.path} is no vfiod server: {error}"
                self._changed.set()
                return
            self._changed.set()
            await asyncio.sleep(RECONNECT_SECONDS[min(attempt, len(RECONNECT_SECONDS) - 1)])
            attempt += 1

    async def _look_again_and_again(self, client: AsyncClient | BusClient, picture: Picture) -> None:
        with client.events() as events:
            while True:
                await self._awake.wait()
                await _look(client, picture, topology=self._view.topology)
                self._changed.set()
                deadline = time.monotonic() + self._interval
                while (left := deadline - time.monotonic()) > 0 and self._awake.is_set():
                    try:
                        picture.events.append(await events.get(left))
                    except RequestTimedOut:
                        break
                    self._changed.set()

    # --- the keyboard -----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _keyboard(self, loop: asyncio.AbstractEventLoop) -> Iterator[None]:
        """Keys as they are pressed; Ctrl-C stays a signal. Without a terminal to read from: none."""
        if not sys.stdin.isatty():
            yield
            return
        number = sys.stdin.fileno()
        before = termios.tcgetattr(number)
        tty.setcbreak(number)
        loop.add_reader(number, self._readable, number)
        try:
            yield
        finally:
            loop.remove_reader(number)
            termios.tcsetattr(number, termios.TCSADRAIN, before)

    def _readable(self, number: int) -> None:
        data = os.read(number, 1024)
        for key in keys_of(data) if data else ["q"]:  # the terminal has gone
            self._press(key)

    def _press(self, key: str) -> None:
        self._view.press(key, max(len(self._pictures), 1), page=max(self._console.height // 2, 1))
        if self._view.reset:
            self._view.reset = False
            for picture in self._pictures:
                picture.reset_peaks()
        if self._view.paused:
            self._awake.clear()
        else:
            self._awake.set()
        self._changed.set()


def sockets_in(directory: Path, pattern: str) -> list[str]:
    """Sockets of that name in a directory and in those directly in it, in order."""
    found = {path for place in (pattern, f"*/{pattern}") for path in directory.glob(place) if path.is_socket()}
    return sorted(map(os.fspath, found))


def _is_plain(console: Console) -> bool:
    return not console.encoding.lower().startswith("utf")
