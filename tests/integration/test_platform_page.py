"""docs/platform.md, run as its reader runs it: its commands, then its programs, in an empty directory."""

from __future__ import annotations

import fnmatch
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs/platform.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def commands() -> list[tuple[str, str]]:
    """Each command, and what the page says that it prints; ``...`` stands for anything."""
    found: list[tuple[str, str]] = []
    for line in "".join(blocks("console")).splitlines():
        if line.startswith("$ "):
            found.append((line[2:], ""))
        else:
            found[-1] = (found[-1][0], found[-1][1] + line + "\n")
    return found


def like(text: str, pattern: str) -> bool:
    quoted = re.sub(r"([\[\]?*])", r"[\1]", pattern)
    return fnmatch.fnmatchcase(text, quoted.replace("...", "*"))


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A directory of its own, with ``vfiod`` on the path."""
    programs = tmp_path / "bin"
    programs.mkdir()
    script = programs / "vfiod"
    program = "import sys\nfrom vfiod.client.program import main\nsys.argv[0] = 'vfiod'\nsys.exit(main())\n"
    script.write_text(f"#!{sys.executable}\n{program}")
    script.chmod(0o755)
    path = os.pathsep.join(entry for entry in sys.path if entry)
    yield dict(os.environ) | {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": path}


def wait_for(path: Path, server: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 100
    while not path.exists():
        assert server.poll() is None, server.communicate()
        assert time.monotonic() < deadline, "vfiod does not listen"
        time.sleep(0.02)


def test_every_line_of_the_page(tmp_path: Path, environment: dict[str, str]) -> None:
    (serve, nothing), *calls = commands()
    assert serve.startswith("vfiod serve ") and serve.endswith(" &") and not nothing
    server = subprocess.Popen(
        ["bash", "-c", f"exec {serve[:-2]}"], cwd=tmp_path, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        wait_for(tmp_path / "vm1.sock", server)
        for command, expected in calls:
            done = subprocess.run(
                ["bash", "-c", command], cwd=tmp_path, env=environment, check=False, timeout=100,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
            assert done.returncode == 0, (command, done.stdout)
            assert like(done.stdout, expected), (command, done.stdout, expected)
        program = tmp_path / "program.py"
        program.write_text("".join(blocks("python")))
        done = subprocess.run(
            [sys.executable, "-W", "error", str(program)], cwd=tmp_path, env=environment, check=False, timeout=300,
            capture_output=True, text=True,
        )  # fmt: skip
        (printed,) = blocks("text")
        assert (done.stdout, done.stderr) == (printed, "")
    finally:
        server.terminate()
        server.communicate(timeout=60)
    assert server.returncode == 0
