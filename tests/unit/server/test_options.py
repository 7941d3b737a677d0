"""Options, from the command line and from TOML: every wrong one is named, with what would be right."""

from __future__ import annotations

import grp
import logging
import os
from pathlib import Path

import pytest

from vfiod.server.options import OptionError, SocketOption, parse

LEAST = ["--name", "vm0", "--qmp", "unix:/x"]


def test_the_least() -> None:
    options = parse(LEAST)
    assert options.name == "vm0"
    assert options.sockets == (SocketOption("qmp", path="/x"),)
    assert options.uuid is None
    assert not options.allow_open
    assert options.allow_uid == frozenset()
    assert options.socket_gid is None
    assert options.pidfile is None
    assert options.log_level == logging.WARNING
    assert options.trace == ()


def test_all_of_them() -> None:
    group = grp.getgrgid(os.getgid()).gr_name
    options = parse(
        [
            "--name=vm 1", "--uuid", "4DBF9FE8-0000-4000-8000-000000000001", "--qmp", "unix:/a b", "--qmp", "fd=7",
            "--jsonrpc", "unix:j", "--allow-open", "--allow-uid", "1000", "--allow-uid=1001", "--socket-group", group,
            "--pidfile", "/p", "--log-level", "Debug", "--trace", "irq_*", "--trace", "reset_*",
        ]
    )  # fmt: skip
    assert options.uuid == "4dbf9fe8-0000-4000-8000-000000000001"
    assert [str(one) for one in options.sockets] == ["unix:/a b", "fd=7", "unix:j"]
    assert [one.dialect for one in options.sockets] == ["qmp", "qmp", "jsonrpc"]
    assert options.allow_open
    assert options.allow_uid == {1000, 1001}
    assert options.socket_gid == os.getgid()
    assert options.log_level == logging.DEBUG
    assert options.trace == ("irq_*", "reset_*")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--qmp", "unix:/x"], "--name is missing: give the VM's name"),
        (["--name", "", "--qmp", "unix:/x"], "--name is missing: give the VM's name"),
        (["--name", "a\nb", "--qmp", "unix:/x"], "--name expects at most 255 printable characters"),
        (
            ["--name", "vm0"],
            "No socket to serve: give --qmp or --jsonrpc with unix:PATH or fd=N, or --bus with ipc:PATH",
        ),
        ([*LEAST, "--uuid", "42"], "--uuid expects a UUID in its 8-4-4-4-12 form, got '42'"),
        (["--name", "v", "--qmp", "/x"], "--qmp expects unix:PATH or fd=N, got '/x'"),
        (["--name", "v", "--qmp", "unix:"], "--qmp expects unix:PATH or fd=N, got 'unix:'"),
        (["--name", "v", "--jsonrpc", "fd:3"], "--jsonrpc expects unix:PATH or fd=N, got 'fd:3'"),
        (["--name", "v", "--jsonrpc", "fd=-3"], "--jsonrpc expects unix:PATH or fd=N, got 'fd=-3'"),
        (["--name", "v", "--qmp", "tcp:1"], "--qmp expects unix:PATH or fd=N, got 'tcp:1'"),
        ([*LEAST, "--jsonrpc", "unix:/x"], "unix:/x is given twice: each socket serves one dialect"),
        ([*LEAST, "--allow-uid", "joe"], "--allow-uid expects a user's number, got 'joe'"),
        ([*LEAST, "--allow-uid", "-1"], "--allow-uid expects a user's number, got '-1'"),
        ([*LEAST, "--socket-group", "no such"], "--socket-group: there is no group 'no such'"),
        ([*LEAST, "--log-level", "loud"], "--log-level expects one of debug, info, warning, error, got 'loud'"),
    ],
)
def test_refusals(arguments: list[str], words: str) -> None:
    with pytest.raises(OptionError) as refused:
        parse(arguments)
    assert str(refused.value) == words


@pytest.mark.parametrize("option", ["--buss=ipc:/x", "--nam", "stray"])
def test_what_is_unknown_or_abbreviated_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        parse([*LEAST, option])
    assert refused.value.code == 2
    assert "usage: vfiod serve" in capsys.readouterr().err


def _file(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "vm.toml"
    path.write_text(text)
    return ["--config", str(path)]


def test_a_file_has_the_same_names_and_the_command_line_wins(tmp_path: Path) -> None:
    config = _file(
        tmp_path,
        """
        name = "from-file"
        qmp = ["unix:/a", "unix:/b"]
        jsonrpc = "fd=5"
        allow-open = true
        allow-uid = [1000, 1001]
        log-level = "info"
        trace = "irq_*"
        """,
    )
    options = parse(config)
    assert options.name == "from-file"
    assert [str(one) for one in options.sockets] == ["unix:/a", "unix:/b", "fd=5"]
    assert options.allow_open
    assert options.allow_uid == {1000, 1001}
    options = parse([*config, "--name", "given", "--qmp", "unix:/c"])
    assert options.name == "given"
    assert [str(one) for one in options.sockets] == ["unix:/c", "fd=5"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nmae = 'x'", "has an unknown key 'nmae': did you mean 'name'?"),
        ("alow_open = true", "has an unknown key 'alow_open': did you mean 'allow-open'?"),
        ("zzz = 1", "has an unknown key 'zzz': known are name, uuid, "),
        ("config = 'x'", "has an unknown key 'config': known are "),
        ("name = 5", "'name' is 5, expected a string"),
        ("allow-open = 1", "'allow-open' is 1, expected true or false"),
        ("allow-uid = true", "'allow-uid' is True, expected an integer or a list"),
        ("name = ", "is not TOML: "),
    ],
)
def test_a_wrong_file_is_named_with_its_key(tmp_path: Path, text: str, words: str) -> None:
    config = _file(tmp_path, text)
    with pytest.raises(OptionError) as refused:
        parse([*config, *LEAST])
    assert str(refused.value).startswith("The configuration '")
    assert config[1] in str(refused.value)
    assert words in str(refused.value)


def test_wrong_elements_of_a_list(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"'qmp' holds 1\.5, expected strings"):
        parse([*_file(tmp_path, "qmp = [1.5]"), "--name", "v"])
    with pytest.raises(OptionError, match=r"--allow-uid expects a user's number, got '-1'"):
        parse([*_file(tmp_path, "allow-uid = [-1]"), *LEAST])


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"Cannot read the configuration '.*absent': No such file"):
        parse(["--config", str(tmp_path / "absent")])
