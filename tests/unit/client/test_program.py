"""The `vfiod` program: finds subcommands, and imports no more than it needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vfiod.client.program import SUBCOMMANDS, main


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vfiod.client.program", *arguments], capture_output=True, text=True, check=False
    )


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in SUBCOMMANDS)
    assert main([]) == 2
    assert main(["fly"]) == 2
    assert "no command 'fly'" in capsys.readouterr().err
    assert main(["moniter"]) == 2
    assert "no command 'moniter'; did you mean monitor?" in capsys.readouterr().err
    assert main(["help"]) == 0
    assert capsys.readouterr().out == shown
    with pytest.raises(SystemExit, match="0"):
        main(["help", "call"])
    assert "usage: vfiod call" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert "vfiod" in capsys.readouterr().out


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_subcommand_explains_itself(name: str) -> None:
    done = run(name, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


def test_call_pays_for_what_it_uses() -> None:
    code = (
        "import sys; from vfiod.client.call import main; main(['/nonexistent', 'query-name']);"
        "print(*{'asyncio', 'prompt_toolkit', 'rich', 'zmq', 'jsonrpcserver', 'vfiod.server'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("name", ["call", "monitor", "watch"])
def test_nobody_there(name: str, tmp_path: Path) -> None:
    done = run(name, str(tmp_path / "no.sock"), *(["query-name"] if name == "call" else []))
    assert done.returncode == 1
    assert "ENOENT" in done.stderr
    assert "vfiod serve" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["x.sock", "dma-map", "iova=many"], "takes an integer"),
        (["x.sock", "getfd", "--fd", "name"], "--fd takes NAME=PATH"),
        (["x.sock", "getfd", "--fd", "a=/nonexistent"], "Cannot open /nonexistent: ENOENT"),
        (["x.sock", "getfd", "--fd", "a=fd:77777"], "EBADF"),
        (["x.sock", "getfd", "--fd", "a=fd:x"], "number of an open fd"),
        (["x.sock", "getfd", "--fd", "a=/dev/null", "--fd", "a=/dev/zero"], "given twice"),
        (["x.sock", "dma-map", "--json", "[]"], "--json takes a JSON object"),
    ],
)
def test_call_refuses(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["call", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_serve_becomes_the_server() -> None:
    done = run("serve", "--help")
    assert "--qmp" in done.stdout


def test_the_reader_has_gone() -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", f"{sys.executable} -m vfiod.client.program host list --json | head -c 1"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "BrokenPipe" not in done.stderr
