"""The prompt: a line editor below, answers and events above, and a connection that comes back by itself."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import os
import signal
from collections.abc import AsyncGenerator, Iterable
from pathlib import Path
from typing import Any, Final

import msgspec
from prompt_toolkit import PromptSession, print_formatted_text
from prompt_toolkit.completion import CompleteEvent, Completer
from prompt_toolkit.completion import Completion as Shown
from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.patch_stdout import patch_stdout
from prompt_toolkit.styles import Style

from vfiod.client.aio import AsyncClient
from vfiod.client.call import open_fd
from vfiod.client.dialects import Dialect
from vfiod.client.errors import ClientError, ConnectFailed, ConnectionLost
from vfiod.client.events import Event
from vfiod.client.fds import descriptors
from vfiod.client.line import InvalidLine, parse_line
from vfiod.client.monitor.complete import complete
from vfiod.client.monitor.help import did_you_mean, help_text
from vfiod.client.render import coloured, plain
from vfiod.protocol.errors import RemoteError, VfiodError
from vfiod.protocol.fd import close_all

__all__ = ["Monitor", "run_interactive"]

STYLE: Final = Style.from_dict(
    {
        "json.name": "ansicyan", "json.text": "ansigreen", "json.number": "ansiyellow", "json.word": "ansimagenta",
        "event": "bold ansiblue", "time": "ansibrightblack", "error": "ansired", "note": "ansibrightblack",
        "prompt": "bold", "prompt.lost": "bold ansired",
    }
)  # fmt: skip
RETRY_SECONDS: Final = (0.1, 0.2, 0.5, 1.0, 2.0)  # the last for ever
LIVE_SECONDS: Final = 1.0  # a completion waits no longer for the server


def run_interactive(path: str, dialect: Dialect, *, human: bool, verbose: bool) -> int:
    """Until the person leaves. 0; 1 when there was no server to begin with."""
    return asyncio.run(Monitor(path, dialect, human=human, verbose=verbose).run())


class Monitor(Completer):
    """One person at one server.

    Args:
        path: the monitor's socket.
        dialect: what it speaks.
        human: lines are human monitor commands.
        verbose: show requests.

    """

    def __init__(self, path: str, dialect: Dialect, *, human: bool, verbose: bool) -> None:
        self._path = path
        self._dialect = dialect
        self._human = human
        self._verbose = verbose
        self._client: AsyncClient | None = None
        self._name = Path(path).stem
        self._leaving = False

    async def run(self) -> int:
        """The loop. See :func:`run_interactive`."""
        try:
            await self._connect()
        except ClientError as error:
            self._print(("class:error", str(error)))
            return 1
        session: PromptSession[str] = PromptSession(
            history=_history(), completer=self, complete_while_typing=False, style=STYLE, enable_suspend=True
        )
        keeper = asyncio.create_task(self._keep_connected())
        try:
            with patch_stdout(raw=True):
                while not self._leaving:
                    try:
                        text = await session.prompt_async(self._prompt)
                    except KeyboardInterrupt:  # Ctrl-C clears the line, as in a shell
                        continue
                    except EOFError:
                        break
                    await self._line(session, text.strip())
        finally:
            self._leaving = True
            keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await keeper
            if self._client is not None:
                await self._client.close()
        return 0

    # --- the connection -------------------------------------------------------------------------------------------

    async def _connect(self) -> None:
        client = await AsyncClient.connect(self._path, dialect=self._dialect)
        with contextlib.suppress(VfiodError):  # a server of another kind: its socket's name will do
            self._name = (await client.query_name(timeout=LIVE_SECONDS)).name
        version = client.version.qemu if client.version else None
        numbers = f" {version.major}.{version.minor}.{version.micro}" if version else ""
        self._client = client
        self._print(("class:note", f"Connected to {self._name}{numbers}. 'help' lists commands, Tab completes them."))

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
                self._client = None
            await asyncio.sleep(RETRY_SECONDS[min(attempt, len(RETRY_SECONDS) - 1)])
            attempt += 1
            try:
                await self._connect()
            except ConnectFailed:
                continue
            except ClientError as error:
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
            return (await editor.prompt_async(question)).strip().lower() in ("y", "yes")
        except (EOFError, KeyboardInterrupt):
            return False

    async def _interruptible(self, work: Any) -> None:
        """Ctrl-C stops waiting for an answer; what the server does goes on."""
        task = asyncio.ensure_future(work)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, task.cancel)
        try:
            await task
        except asyncio.CancelledError:
            if (current := asyncio.current_task()) is not None and current.cancelling():
                raise
            self._print(("class:note", "No longer waiting; the command may still be carried out."))
        finally:
            loop.remove_signal_handler(signal.SIGINT)

    async def _command(self, client: AsyncClient, text: str) -> None:
        try:
            if self._human:
                self._print(("", _printable(await client.human_monitor_command(command_line=text)).rstrip("\n")))
            elif text.startswith("pass "):
                await self._pass(client, text.removeprefix("pass ").strip())
            else:
                line = parse_line(text)
                if self._verbose:
                    request = {"exec-oob" if line.oob else "execute": line.command, "arguments": line.arguments}
                    self._print(("class:note", f"-> {json.dumps(request)}"))
                result = await client.execute(line.command, line.arguments, oob=line.oob)
                try:
                    self._print(*coloured(plain(result)))
                finally:
                    close_all(descriptors(result))
        except RemoteError as error:
            hint = did_you_mean(error.command) if error.remote_class == "CommandNotFound" else ""
            errno = f" [{error.errno}]" if error.errno else ""
            self._print(("class:error", f"{error.remote_class}: {_printable(error.desc)}{errno}{hint}"))
        except ConnectionLost:
            pass  # the keeper says so
        except (ClientError, ValueError) as error:
            self._print(("class:error", str(error)))

    async def _pass(self, client: AsyncClient, text: str) -> None:
        name, _, path = text.partition("=")
        if not name or not path:
            raise InvalidLine("pass takes NAME=PATH, such as pass ram=/dev/shm/guest")
        with open_fd(path) as fd:
            kind = (await client.getfd(fdname=name, fd=fd)).kind
        self._print(("class:note", f"{name}: {kind.value}"))

    # --- output -----------------------------------------------------------------------------------------------------

    def _prompt(self) -> FormattedText:
        style = "class:prompt" if self._client is not None else "class:prompt.lost"
        return FormattedText([(style, f"({self._name}) " if self._client is not None else f"({self._name}?) ")])

    def _event(self, event: Event) -> None:
        when = datetime.datetime.fromtimestamp(max(event.timestamp, 0)).astimezone().strftime("%H:%M:%S.%f")[:-3]
        data = coloured(msgspec.to_builtins(event.data))
        self._print(("class:time", when + " "), ("class:event", event.name + " "), *data)

    def _print(self, *pieces: tuple[str, str]) -> None:
        print_formatted_text(FormattedText(pieces), style=STYLE)

    # --- completion -------------------------------------------------------------------------------------------------

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Shown]:
        """Only the asynchronous one is used."""
        return ()

    async def get_completions_async(
        self, document: Document, complete_event: CompleteEvent
    ) -> AsyncGenerator[Shown, None]:
        """Completions from the catalogue, and from the server where names live there."""
        if self._human:
            return
        found = complete(document.text_before_cursor.lstrip())
        for candidate in found.candidates:
            yield Shown(candidate.text, -len(found.prefix), display_meta=candidate.about)
        if found.live is not None:
            for name in await self._live(found.live):
                if name.startswith(found.prefix):
                    yield Shown(name, -len(found.prefix), display_meta=found.live)

    async def _live(self, kind: str) -> list[str]:
        """Names of a kind that the server knows now; none when it does not tell in time."""
        client = self._client
        if client is None:
            return []
        oob = self._dialect is Dialect.QMP  # ahead of whatever is waiting
        try:
            match kind:
                case "devices":
                    return [device.id for device in await client.query_devices(oob=oob, timeout=LIVE_SECONDS)]
                case "objects":
                    return [made.id for made in await client.query_objects(oob=oob, timeout=LIVE_SECONDS)]
                case "fds":
                    named = [fd.name for fd in await client.query_fds(oob=oob, timeout=LIVE_SECONDS)]
                    sets = await client.query_fdsets(oob=oob, timeout=LIVE_SECONDS)
                    return [n for n in named if isinstance(n, str)] + [f"/dev/fdset/{s.fdset_id}" for s in sets]
                case "traces":
                    points = await client.trace_event_get_state(name="*", oob=oob, timeout=LIVE_SECONDS)
                    return [point.name for point in points]
            types = await client.query_mdev_types(oob=oob, timeout=LIVE_SECONDS)
            names = {
                "mdevs": [device.uuid for made in types for device in made.devices],
                "parents": sorted({made.parent for made in types}),
                "types": [made.type for made in types],
            }
            return names.get(kind, [])
        except (VfiodError, ValueError):
            return []


def _printable(text: str) -> str:
    """Text from a server without what would drive the terminal."""
    return "".join(char if char.isprintable() or char in "\n\t" else "?" for char in text)


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
