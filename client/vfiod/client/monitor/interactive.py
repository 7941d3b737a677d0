"""The prompt: a line editor below, answers and events above, and a connection that comes back by itself."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import os
import shutil
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec
from prompt_toolkit import PromptSession, print_formatted_text
from prompt_toolkit.application import get_app, run_in_terminal
from prompt_toolkit.completion import CompleteEvent, Completer
from prompt_toolkit.completion import Completion as Shown
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import ColorDepth
from prompt_toolkit.patch_stdout import patch_stdout
from prompt_toolkit.styles import Style

from vfiod.client.dialects import Dialect
from vfiod.client.errors import ClientError, ConnectFailed, ConnectionLost
from vfiod.client.events import Event
from vfiod.client.fds import descriptors
from vfiod.client.line import is_unfinished, parse_line
from vfiod.client.monitor.complete import LOCAL, command_in, complete, complete_human
from vfiod.client.monitor.help import help_text
from vfiod.client.monitor.local import open_named
from vfiod.client.monitor.names import LIVE_SECONDS, live_names
from vfiod.client.near import meant
from vfiod.client.render import WIDE, coloured, plain, table
from vfiod.protocol.errors import RemoteError, VfiodError
from vfiod.protocol.fd import FileDescriptor, close_all

if TYPE_CHECKING:
    from vfiod.client.aio import AsyncClient
    from vfiod.client.monitor.overbus import BusClient

__all__ = ["Monitor", "run_interactive"]

STYLE: Final = Style.from_dict(
    {
        "json.name": "ansicyan", "json.text": "ansigreen", "json.number": "ansiyellow", "json.word": "ansimagenta",
        "event": "bold ansiblue", "time": "ansibrightblack", "error": "ansired", "note": "ansibrightblack",
        "prompt": "bold", "head": "bold underline", "prompt.lost": "bold ansired",
    }
)  # fmt: skip
RETRY_SECONDS: Final = (0.1, 0.2, 0.5, 1.0, 2.0)  # the last for ever


Connect: TypeAlias = "Callable[[], Awaitable[AsyncClient | BusClient]]"


def run_interactive(path: str, dialect: Dialect, connect: Connect, **options: Any) -> int:
    """Until the person leaves. 0; 1 when there was no server to begin with. The arguments are :class:`Monitor`'s."""
    return asyncio.run(Monitor(connect, path, dialect, **options).run())


class Monitor(Completer):
    """One person at one server.

    Args:
        connect: makes a new connection.
        path: the monitor's socket, or the bus: what messages call it.
        dialect: what it speaks.
        human: lines are human monitor commands.
        verbose: show requests.
        fds: passed under their names at the start, and again to a server that came back. The caller closes them.
        colour: whether colours may be used.

    """

    def __init__(
        self,
        connect: Connect,
        path: str,
        dialect: Dialect,
        *,
        human: bool,
        verbose: bool,
        fds: Mapping[str, FileDescriptor],
        colour: bool,
    ) -> None:
        self._open = connect
        self._path = path
        self._dialect = dialect
        self._human = human
        self._verbose = verbose
        self._fds = fds
        self._depth = None if colour else ColorDepth.DEPTH_1_BIT
        self._client: AsyncClient | BusClient | None = None
        self._name = Path(path).stem
        self._leaving = False
        self._interrupted = False
        self._waiting: asyncio.Task[None] | None = None

    async def run(self) -> int:
        """The loop. See :func:`run_interactive`."""
        try:
            await self._connect()
        except ClientError as error:
            self._print(("class:error", str(error)))
            return 1
        session = self._editor()
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, self._sigint, session)
        keeper = asyncio.create_task(self._keep_connected())
        try:
            with patch_stdout(raw=True):
                while not self._leaving:
                    try:
                        text = await session.prompt_async(self._prompt, handle_sigint=False)
                    except KeyboardInterrupt:  # Ctrl-C clears the line, as in a shell; the second leaves
                        self._leaving = self._interrupted
                        self._interrupted = True
                        if not self._leaving:
                            self._print(("class:note", "Ctrl-C again leaves."))
                        continue
                    except EOFError:
                        break
                    self._interrupted = False
                    await self._line(session, text.strip())
        finally:
            self._leaving = True
            keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await keeper
            if self._client is not None:
                await self._client.close()
        return 0

    def _editor(self) -> PromptSession[str]:
        keys = KeyBindings()

        @keys.add("f1")
        def _(event: KeyPressEvent) -> None:
            text = help_text(command_in(event.current_buffer.text))
            run_in_terminal(lambda: self._print(("", text)))

        return PromptSession(
            history=_history(), completer=self, complete_while_typing=False, style=STYLE, enable_suspend=True,
            multiline=Condition(lambda: is_unfinished(get_app().current_buffer.text)), key_bindings=keys,
            prompt_continuation=lambda width, number, wrapped: " " * width, color_depth=self._depth,
        )  # fmt: skip

    # --- the connection -------------------------------------------------------------------------------------------

    async def _connect(self) -> None:
        client = await self._open()
        with contextlib.suppress(VfiodError):  # a server of another kind: its socket's name will do
            self._name = (await client.query_name(timeout=LIVE_SECONDS)).name
        version = client.version.qemu if client.version else None
        numbers = f" {version.major}.{version.minor}.{version.micro}" if version else ""
        self._client = client
        self._print(("class:note", f"Connected to {self._name}{numbers}. 'help' lists commands, Tab completes them."))
        for name, fd in self._fds.items():  # names belong to a session: a new one gets them anew
            kind = (await client.getfd(fdname=name, fd=fd)).kind
            self._print(("class:note", f"{name}: {kind.value}"))

    async def _keep_connected(self) -> None:
        """Print events; when the connection is lost, make it again."""
        attempt = 0
        while True:
            if self._client is not None:
                attempt = 0
                try:
                    with self._client.events() as events:
                        async for event in events:
                            self._event(event)
                except ClientError as error:
                    self._print(("class:error", f"{error}. Trying to connect again; 'exit' leaves."))
                await self._client.close()
                self._client = None
            await asyncio.sleep(RETRY_SECONDS[min(attempt, len(RETRY_SECONDS) - 1)])
            attempt += 1
            try:
                await self._connect()
            except ConnectFailed:
                continue
            except (VfiodError, ValueError) as error:
                self._print(("class:error", str(error)))

    # --- lines ------------------------------------------------------------------------------------------------------

    async def _line(self, session: PromptSession[str], text: str) -> None:
        """One line the person has typed."""
        word, _, rest = text.partition(" ")
        if not text:
            return
        if word == "exit":
            self._leaving = True
        elif word == "help" and not self._human:
            self._print(("", help_text(rest.strip())))
        elif word == "quit" and not await self._really(session):
            self._print(("class:note", "The server runs on. 'exit' leaves the monitor."))
        elif self._client is None:
            self._print(("class:error", f"Not connected to {self._path}"))
        else:
            await self._interruptible(self._command(self._client, text))

    async def _really(self, session: PromptSession[str]) -> bool:
        """``quit`` is the server's word: it ends it, and takes the devices from the VM."""
        question = f"'quit' ends the server {self._name} and closes its devices. Really? [y/N] "
        editor: PromptSession[str] = PromptSession(history=InMemoryHistory())
        try:
            return (await editor.prompt_async(question, handle_sigint=False)).strip().lower() in ("y", "yes")
        except (EOFError, KeyboardInterrupt):
            return False

    async def _interruptible(self, work: Coroutine[Any, Any, None]) -> None:
        """Ctrl-C stops waiting for an answer; what the server does goes on."""
        self._waiting = asyncio.create_task(work)
        try:
            await self._waiting
        except asyncio.CancelledError:
            if (current := asyncio.current_task()) is not None and current.cancelling():
                raise
            self._interrupted = True
            self._print(("class:note", "No longer waiting; the command may still be carried out. Ctrl-C again leaves."))
        finally:
            self._waiting = None

    def _sigint(self, session: PromptSession[str]) -> None:
        """One handler from the first prompt to the last, so that no Ctrl-C meets none.

        While a line is edited, the terminal is raw and Ctrl-C is a key; the signal then comes from elsewhere.
        """
        if self._waiting is not None:
            self._waiting.cancel()
        elif session.app.is_running:
            session.app.key_processor.send_sigint()

    async def _command(self, client: AsyncClient | BusClient, text: str) -> None:
        given: dict[str, Any] = {}
        try:
            if self._human:
                self._print(("", _printable(await client.human_monitor_command(command_line=text)).rstrip("\n")))
            elif (named := open_named(text)) is not None:
                name, fd = named
                with fd:
                    kind = (await client.getfd(fdname=name, fd=fd)).kind
                self._print(("class:note", f"{name}: {kind.value}"))
            else:
                as_json = text.startswith("json ")
                line = parse_line(text.removeprefix("json "))
                given = line.arguments
                if self._verbose:
                    request = {"exec-oob" if line.oob else "execute": line.command, "arguments": line.arguments}
                    self._print(("class:note", f"-> {json.dumps(request)}"))
                result = await client.execute(line.command, line.arguments, oob=line.oob)
                try:
                    self._print(*self._shown(plain(result), as_json=as_json))
                finally:
                    close_all(descriptors(result))
        except RemoteError as error:
            hint = meant(error.command, given, more=LOCAL)
            errno = f" [{error.errno}]" if error.errno else ""
            self._print(("class:error", f"{error.remote_class}: {_printable(error.desc)}{errno}{hint}"))
        except ConnectionLost:
            pass  # the keeper says so
        except (ClientError, ValueError) as error:
            self._print(("class:error", str(error)))

    # --- output -----------------------------------------------------------------------------------------------------

    def _prompt(self) -> FormattedText:
        longest = max(_columns() // 3, 4)  # the name leaves room for a line
        name = self._name if len(self._name) <= longest else self._name[: longest - 1] + "~"
        if self._client is None:
            return FormattedText([("class:prompt.lost", f"({name}?) ")])
        return FormattedText([("class:prompt", f"({name}) ")])

    def _shown(self, value: Any, *, as_json: bool) -> Iterator[tuple[str, str]]:
        """A reply: a table where it is a list of objects, else JSON."""
        if isinstance(value, dict) and isinstance(text := value.get("text"), str) and "\n" in text and not as_json:
            return iter([("", _printable(text).rstrip("\n"))])  # query-topology format=tree: a drawing
        columns = _columns()
        rows = None if as_json else table(value, columns)
        return coloured(value, room=min(columns, WIDE)) if rows is None else rows

    def _event(self, event: Event) -> None:
        """In a lane of its own, above the line that is being typed."""
        when = datetime.datetime.fromtimestamp(max(event.timestamp, 0)).astimezone().strftime("%H:%M:%S.%f")[:-3]
        room = min(_columns(), WIDE) - len(f"| {when} {event.name} ")
        pieces = [("class:time", f"{when} "), ("class:event", f"{event.name} ")]
        pieces += coloured(msgspec.to_builtins(event.data), room=room)
        lane: list[tuple[str, str]] = [("class:event", "| ")]
        for style, text in pieces:
            first, *more = text.split("\n")
            lane.append((style, first))
            for rest in more:
                lane += [("class:event", "\n| "), (style, rest)]
        self._print(*lane)

    def _print(self, *pieces: tuple[str, str]) -> None:
        print_formatted_text(FormattedText(pieces), style=STYLE, color_depth=self._depth)

    # --- completion -------------------------------------------------------------------------------------------------

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Shown]:
        """Only the asynchronous one is used."""
        return ()

    async def get_completions_async(
        self, document: Document, complete_event: CompleteEvent
    ) -> AsyncGenerator[Shown, None]:
        """Completions from the catalogue, and from the server where names live there."""
        text = document.text_before_cursor.lstrip()
        found = complete_human(text) if self._human else complete(text)
        for candidate in found.candidates:
            yield Shown(candidate.text, -len(found.prefix), display_meta=candidate.about)
        if found.live is None or self._client is None:
            return
        before, after = found.quotes
        for name in await live_names(self._client, found.live, oob=self._dialect is Dialect.QMP):
            if name.startswith(found.prefix):
                yield Shown(before + name + after, -len(found.prefix), display_meta=found.live)


def _printable(text: str) -> str:
    """Text from a server without what would drive the terminal."""
    return "".join(char if char.isprintable() or char in "\n\t" else "?" for char in text)


def _columns() -> int:
    return shutil.get_terminal_size().columns


def _history() -> History:
    """``$XDG_STATE_HOME/vfiod/history``, the person's alone; in memory where that cannot be."""
    base = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state")
    path = base / "vfiod" / "history"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
        with path.open("a"):
            pass
    except (OSError, RuntimeError):
        return InMemoryHistory()
    return FileHistory(path)
