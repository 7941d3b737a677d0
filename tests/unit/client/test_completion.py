"""Completion, asked of real shells: bash, and zsh and fish where they are installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from vfiod.client.completion import SHELLS, script
from vfiod.client.program import SUBCOMMANDS
from vfiod.client.programs import options_of, programs
from vfiod.protocol.catalogue import COMMANDS
from vfiod.protocol.settings import SERVE

PATIENCE = 120


def needs(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed (apt install {shell})")


def bash(tmp_path: Path, *words: str) -> list[str]:
    """What bash would offer for the last word; readline's cutting at = and : is done as readline does it."""
    needs("bash")
    (tmp_path / "vfiod.bash").write_text(script("bash"))
    cut = [piece for word in words[:-1] for piece in re.findall(r"[=:]|[^=:]+", word)]
    last = re.findall(r"[=:]|[^=:]+", words[-1]) or [""]
    program = (
        'source ./vfiod.bash; COMP_WORDS=(vfiod "$@"); COMP_CWORD=$#; _vfiod; '
        '((${#COMPREPLY[@]})) && printf "%s\\n" "${COMPREPLY[@]}"; true'
    )
    ran = subprocess.run(
        ["bash", "--norc", "-c", program, "bash", *cut, *last],
        cwd=tmp_path, capture_output=True, text=True, check=True, timeout=PATIENCE,
    )  # fmt: skip
    assert ran.stderr == ""
    return sorted(ran.stdout.split("\n")[:-1])


def test_bash_offers_what_there_is(tmp_path: Path) -> None:
    assert bash(tmp_path, "") == sorted([*SUBCOMMANDS, "--help", "--version"])
    assert bash(tmp_path, "mo") == ["monitor"]
    assert bash(tmp_path, "serve", "--") == sorted(["--help", *(f"--{one.name}" for one in SERVE)])
    assert bash(tmp_path, "serve", "--log-l") == ["--log-level"]
    assert bash(tmp_path, "serve", "--log-level", "") == ["debug", "error", "info", "warning"]
    assert bash(tmp_path, "serve", "--log-level=w") == ["warning"]
    assert bash(tmp_path, "serve", "--sandbox=") == ["off", "on", "required"]
    assert bash(tmp_path, "host", "m") == ["mdev"]
    assert bash(tmp_path, "host", "mdev", "") == ["create", "destroy", "list", "types"]
    assert "--uuid" in bash(tmp_path, "host", "mdev", "create", "--")
    assert bash(tmp_path, "completion", "") == ["bash", "fish", "zsh"]
    assert bash(tmp_path, "mdev", "serve", "--share-fd", "o") == ["off", "on"]
    assert bash(tmp_path, "nonsense", "") == []


def test_bash_offers_commands_and_files(tmp_path: Path) -> None:
    (tmp_path / "a file.sock").touch()
    (tmp_path / "dir").mkdir()
    assert bash(tmp_path, "call", "a") == ["a file.sock"]
    assert bash(tmp_path, "call", "vm.sock", "query-dev") == sorted(x for x in COMMANDS if x.startswith("query-dev"))
    assert bash(tmp_path, "call", "--timeout", "5", "vm.sock", "device_a") == ["device_add"]
    assert bash(tmp_path, "call", "--fd", "g=/dev/null", "vm.sock", "device_a") == ["device_add"]
    assert bash(tmp_path, "call", "vm.sock", "getfd", "--fd", "x=a") == ["a file.sock"]
    assert bash(tmp_path, "call", "vm.sock", "dma-map", "") == []
    assert bash(tmp_path, "watch", "one", "two", "di") == ["dir"]
    assert bash(tmp_path, "serve", "--config", "a") == ["a file.sock"]


@pytest.mark.parametrize("shell", sorted(SHELLS))
def test_every_program_and_option_is_there(shell: str) -> None:
    text = script(shell)
    for program in programs():
        assert program.words[-1] in text
        for option in options_of(program)[0]:
            for name in option.option_strings:
                kind = "l" if name.startswith("--") else "s"
                assert (f"-{kind} {name.lstrip('-')} " if shell == "fish" else name) in text
    assert "device_add" in text


@pytest.mark.parametrize("shell", sorted(SHELLS))
def test_the_shell_reads_it(shell: str, tmp_path: Path) -> None:
    needs(shell)
    file = tmp_path / "script"
    file.write_text(script(shell))
    ran = subprocess.run([shell, "-n", str(file)], capture_output=True, text=True, timeout=PATIENCE)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_fish_offers_what_there_is(tmp_path: Path) -> None:
    needs("fish")
    file = tmp_path / "vfiod.fish"
    file.write_text(script("fish"))

    def fish(line: str) -> list[str]:
        command = f"source {file}; complete -C '{line}'"
        ran = subprocess.run(["fish", "-N", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
        return sorted(one.partition("\t")[0] for one in ran.stdout.splitlines())

    assert fish("vfiod mo") == ["monitor"]
    assert fish("vfiod serve --log-level ") == ["debug", "error", "info", "warning"]
    assert fish("vfiod host mdev ") == ["create", "destroy", "list", "types"]
