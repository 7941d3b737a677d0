"""One page, run as its reader runs it: in an empty directory, from its first block to its last."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from tests.integration.pages.blocks import REPO, Block, Page
from tests.integration.pages.conversation import converse
from tests.integration.pages.matching import like
from tests.integration.terminal.screen import Screen

from vfiod.client.spawn import accepts
from vfiod.server.sandbox.files import is_shared

PATIENCE: Final = 120.0
"""Seconds until what is awaited must have come: a busy machine is no failure."""


class Session:
    """A page's directory, what runs in it, and what of its program was read so far."""

    def __init__(self, page: Page, directory: Path) -> None:
        self.page = page
        self.directory = directory / "here"
        self.directory.mkdir(mode=0o700)
        if page.replace and is_shared(page.replace):
            self.directory.chmod(0o1777)  # what stands for /tmp is shared as /tmp is, which the sandbox minds
        (self.directory / "examples").symlink_to(REPO / "examples")
        self.environment = environment(directory)
        self.servers: list[tuple[str, subprocess.Popen[bytes], Path]] = []
        self.sockets: list[str] = []
        self.program: list[str] = []
        self.done = 0

    def run(self) -> None:
        """All of the page; its servers are ended, and have ended well."""
        try:
            if self.page.serve:
                self._serve(f"vfiod serve {self.page.serve}")
            for block in self.page.blocks:
                self._block(block)
            if self.program:
                self._program("")
            self._end()
        finally:
            for _, server, _ in self.servers:
                server.kill()
                server.wait()

    def here(self, text: str) -> str:
        """With the page's own directory in place of the one that stands for it."""
        return text.replace(self.page.replace, str(self.directory)) if self.page.replace else text

    def _block(self, block: Block) -> None:
        if any(how in block.how for how in ("of", "run-by", "not-run", "drawing")) or not self._can(block):
            return
        self.done += 1
        text = self.here(block.text)
        if name := block.how.get("file"):
            path = self.directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        elif block.language == "python":
            self.program.append(text)
        elif block.language == "text":
            self._program(text)
        elif block.language == "console":
            for command, printed in commands(text):
                self._command(block, command, printed)
        elif block.language == "json":
            converse(self.directory / block.how.get("socket", self.sockets[0]), text, block.place)
        elif block.language == "terminal":
            for command, appears in commands(text):
                self._at_terminal(command, appears)
        elif block.language == "monitor":
            self._type(text)

    def _can(self, block: Block) -> bool:
        needed = block.how.get("needs")
        return needed is None or (Path(needed).exists() if "/" in needed else shutil.which(needed) is not None)

    def _command(self, block: Block, command: str, printed: str) -> None:
        if command.endswith("&"):
            self._serve(command[:-1].strip(), printed)
            return
        done = subprocess.run(
            ["bash", "-c", command], cwd=self.directory, env=self.environment, check=False, timeout=300,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert done.returncode == 0, f"{block.place}: {command}: status {done.returncode}\n{done.stdout}"
        assert like(done.stdout, printed), f"{block.place}: {command}: printed\n{done.stdout}\nand not\n{printed}"

    def _serve(self, command: str, printed: str = "") -> None:
        log = self.directory.parent / f"server{len(self.servers)}.log"
        with log.open("wb") as output:
            server = subprocess.Popen(
                ["bash", "-c", f"exec {command}"], cwd=self.directory, env=self.environment,
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip
        self.servers.append((command, server, log))
        waited_for: list[Callable[[], bool]] = [lambda: like(log.read_text(), printed + "...")]
        for way, path in re.findall(r"--(qmp|jsonrpc|metrics) unix:([^,\s]+)", command):
            waited_for.append(lambda path=path: accepts(self.directory / path))  # type: ignore[misc]
            if way == "qmp":
                self.sockets.append(path)
        for path in re.findall(r"(?:--socket-path[ =]|ipc:)([^,\s]+)", command):
            waited_for.append(lambda path=path: (self.directory / path).exists())  # type: ignore[misc]
        deadline = time.monotonic() + PATIENCE
        while not all(there() for there in waited_for):
            assert server.poll() is None, f"{command}: ended with status {server.returncode}\n{log.read_text()}"
            assert time.monotonic() < deadline, f"{command}: not there after {PATIENCE:g} s\n{log.read_text()}"
            time.sleep(0.01)

    def _program(self, printed: str) -> None:
        program = self.directory.parent / "program.py"
        program.write_text("".join(self.program))
        self.program.clear()
        done = subprocess.run(
            [sys.executable, "-W", "error", str(program)], cwd=self.directory, env=self.environment, check=False,
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.stderr == "", f"{self.page.name}: its program:\n{done.stdout}{done.stderr}"
        assert like(done.stdout, printed), f"{self.page.name}: its program printed\n{done.stdout}\nand not\n{printed}"

    def _at_terminal(self, command: str, appears: str) -> None:
        program, *arguments = shlex.split(command)
        assert program == "vfiod", f"{self.page.name}: terminal blocks are for vfiod"
        where, home = self.directory, self.directory.parent
        with Screen(*arguments, home=home, columns=120, lines=40, directory=where) as person:
            person.see(*appears.splitlines())

    def _type(self, text: str) -> None:
        socket_name = self.sockets[0]
        prompt = re.match(r"\(\S+\) ", text)
        assert prompt, f"{self.page.name}: a monitor block begins with the prompt"
        with Screen(
            "monitor", self.directory / socket_name, home=self.directory.parent, columns=120, lines=60
        ) as person:
            person.see("Connected to")
            for step in text.split(prompt[0])[1:]:
                *typed, answer = step.rstrip("\n").split("\n")
                person.until(lambda shown: shown.endswith(prompt[0].strip()), "the prompt")
                person.screen.reset()
                person.type("\x0c" + "\r".join(typed) + "\r")
                last = typed[-1]
                person.until(
                    lambda shown, last=last, answer=answer: answer in shown.rpartition(last)[2],  # type: ignore[misc]
                    f"{answer} after {last}",
                )

    def _end(self) -> None:
        for command, server, log in reversed(self.servers):
            server.terminate()
            status = server.wait(PATIENCE)
            said = log.read_text()
            assert status == 0, f"{command}: ended with status {status}\n{said}"
            assert "Traceback" not in said, f"{command}:\n{said}"


def environment(directory: Path) -> dict[str, str]:
    """Ours, with ``vfiod`` and ``python`` on the path."""
    programs = directory / "bin"
    programs.mkdir()
    program = "import sys\nfrom vfiod.client.program import main\nsys.argv[0] = 'vfiod'\nsys.exit(main())\n"
    for name, text in (
        ("vfiod", f"#!{sys.executable}\n{program}"),
        ("python", f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n'),
    ):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    path = os.pathsep.join(entry for entry in sys.path if entry)
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    return kept | {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": path, "NO_COLOR": "1"}


def commands(text: str) -> Iterator[tuple[str, str]]:
    """Each command of a console block, and what it prints."""
    for typed in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        lines = typed.splitlines()
        count = 1
        while lines[count - 1].endswith("\\"):
            count += 1
        yield "\n".join(lines[:count]), "".join(f"{line}\n" for line in lines[count:])
