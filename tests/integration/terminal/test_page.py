"""docs/monitor.md, run as its reader runs it: its lines at a terminal, its commands in a shell."""

from __future__ import annotations

import fnmatch
import os
import re
import subprocess
import sys
from pathlib import Path

from vfiod.client.spawn import own_server
from vfiod.client.watch.view import HELP

from .screen import Screen

DOCS = Path(__file__).parents[3] / "docs"
PAGE = (DOCS / "monitor.md").read_text()
PROMPT = "(vm1) "


def blocks(language: str) -> str:
    return "".join(re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))


def steps() -> list[tuple[str, str]]:
    """What is typed at the monitor, and what then appears: a line each."""
    found: list[tuple[str, str]] = []
    for block in blocks("monitor").split(PROMPT)[1:]:
        *typed, answer = block.rstrip("\n").split("\n")
        found.append(("\n".join(typed), answer))
    return found


def commands() -> list[tuple[str, str]]:
    """Each command, and what the page says that it prints; ``...`` stands for anything."""
    found: list[tuple[str, str]] = []
    for line in blocks("console").splitlines():
        if line.startswith("$ "):
            found.append((line[2:], ""))
        else:
            found[-1] = (found[-1][0], found[-1][1] + line + "\n")
    return found


def like(text: str, pattern: str) -> bool:
    quoted = re.sub(r"([\[\]?*])", r"[\1]", pattern)
    return fnmatch.fnmatchcase(text, quoted.replace("...", "*"))


def environment(directory: Path) -> dict[str, str]:
    """With ``vfiod`` on the path."""
    script = directory / "bin" / "vfiod"
    script.parent.mkdir()
    program = "import sys\nfrom vfiod.client.program import main\nsys.argv[0] = 'vfiod'\nsys.exit(main())\n"
    script.write_text(f"#!{sys.executable}\n{program}")
    script.chmod(0o755)
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return dict(os.environ) | {"PATH": f"{script.parent}:{os.environ['PATH']}", "PYTHONPATH": path}


def test_every_line_of_the_page(tmp_path: Path, home: Path) -> None:
    told = environment(tmp_path)
    socket = tmp_path / "vm1.sock"
    with own_server(tmp_path, ["--qmp", f"unix:{socket}"], name="vm1"):
        with Screen("monitor", socket, home=home, columns=120, lines=60) as person:
            person.see("Connected to vm1")
            for typed, answer in steps():
                person.until(lambda text: text.endswith(PROMPT.strip()), "the prompt")
                person.screen.reset()
                person.type("\x0c" + typed.replace("\n", "\r") + "\r")
                last = typed.rpartition("\n")[2]
                person.until(
                    lambda text, last=last, answer=answer: answer in text.rpartition(last)[2],  # type: ignore[misc]
                    f"{answer} after {last}",
                )
        assert len(steps()) == 7
        for command, expected in commands():
            done = subprocess.run(
                ["bash", "-c", command], cwd=tmp_path, env=told, check=False, timeout=100,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
            assert done.returncode == 0, (command, done.stdout)
            assert like(done.stdout, expected), (command, done.stdout, expected)


def test_what_the_page_shows_is_there() -> None:
    pictures = re.findall(r"\]\((pictures/[a-z-]+\.svg)\)", PAGE)
    assert sorted(f"pictures/{path.name}" for path in (DOCS / "pictures").iterdir()) == sorted(pictures)
    keys = re.findall(r"^\| ([^|]+) \| [^|]+ \|$", PAGE, re.MULTILINE)
    for row in HELP:
        assert any(row[0].split(",")[0].split()[0] == key.split(",")[0] for key in keys), row
