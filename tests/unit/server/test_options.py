"""Options, from the command line and from TOML: every wrong one is named, with what would be right."""

from __future__ import annotations

import grp
import logging
import os
from pathlib import Path

import pytest

from vfiod.protocol.limits import MAX_CONFIG_SIZE
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
        (["--name", "", "--qmp", "unix:/x"], "--name expects 1 to 255 printable characters, got ''"),
        (["--name", "a\nb", "--qmp", "unix:/x"], "--name expects 1 to 255 printable characters, got 'a\\nb'"),
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
        ([*LEAST, "--allow-uid=-1"], "--allow-uid expects a user's number, got -1"),
        ([*LEAST, "--socket-group", "no such"], "--socket-group names no group of this system: 'no such'"),
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
        ("nmae = 'x'", ":1: unknown key 'nmae': did you mean 'name'?"),
        ("\n\nalow_open = true", ":3: unknown key 'alow_open': did you mean 'allow-open'?"),
        ("Log_Level = 'info'", ":1: unknown key 'Log_Level': did you mean 'log-level'?"),
        ("zzz = 1", ":1: unknown key 'zzz': known are name, uuid, "),
        ("config = 'x'", ":1: unknown key 'config': known are "),
        ("# a comment\n[server]\nname = 'x'", ":2: unknown key 'server': there are no sections, every key stands"),
        ("name.first = 'x'", ":1: 'name' is a table, expected a string"),
        ("name = 5", ":1: 'name' is 5, expected a string"),
        ("allow-open = 1", ":1: 'allow-open' is 1, expected true or false"),
        ("allow-uid = true", ":1: 'allow-uid' is true, expected an integer or a list"),
        ("allow-uid = 'me'", ":1: 'allow-uid' is 'me', expected an integer or a list"),
        ("allow-uid = 4294967295", ":1: 'allow-uid' expects a user's number, got 4294967295"),
        ("socket-group = -1", ":1: 'socket-group' expects a group's name, or its number of at most 4294967294, got -1"),
        ("log-level = 'loud'", ":1: 'log-level' expects one of debug, info, warning, error, got 'loud'"),
        ("uuid = '42'", ":1: 'uuid' expects a UUID in its 8-4-4-4-12 form, got '42'"),
        ("metrics = '10.0.0.1:80'", ":1: 'metrics' serves this host only: give 127.0.0.1 or ::1 or localhost"),
        ("trace = ''\nmetrics = '[::1]:65536'", ":2: 'metrics' expects a port up to 65535, got '[::1]:65536'"),
        ("bus = 'tcp:a:1'", ":1: 'bus' tcp:a:1 needs --bus-key and --bus-clients: anything but ipc: is encrypted"),
        ("role = ['a=b', 'a=c']", ":1: 'role' 'a' is given twice: put all its patterns in one"),
        ("name = ", ":1: not TOML: "),
        ("name = 'x'\nqmp = [1, 2\njsonrpc = 3", ":3:1: not TOML: "),
        ("name = 'x'\nname = 'y'", ":2"),
    ],
)
def test_a_wrong_file_is_named_with_its_key(tmp_path: Path, text: str, words: str) -> None:
    config = _file(tmp_path, text)
    with pytest.raises(OptionError) as refused:
        parse([*config, *LEAST])
    assert str(refused.value).startswith(config[1] + words)


def test_everything_that_is_wrong_in_a_file_is_said_at_once_with_its_line(tmp_path: Path) -> None:
    config = _file(
        tmp_path,
        '''
        name = """
        qpm = this is text
        """
        "qpm" = "unix:/a"
        jsonrpc = [
            "unix:/a",   # good
            "tcp:1",
        ]
        allow-open = "yes"
        ''',
    )
    with pytest.raises(OptionError) as refused:
        parse(config)
    at = config[1]
    assert str(refused.value).splitlines() == [
        f"{at}:2: 'name' expects 1 to 255 printable characters, got '        qpm = this is text\\n        '",
        f"{at}:5: unknown key 'qpm': did you mean 'qmp'?",
        f"{at}:8: 'jsonrpc' expects unix:PATH or fd=N, got 'tcp:1'",
        f"{at}:10: 'allow-open' is 'yes', expected true or false",
    ]


def test_what_the_file_cannot_be(tmp_path: Path) -> None:
    path = tmp_path / "vm.toml"
    path.write_bytes(b"name = 'vm'\n# caf\xe9\n")
    with pytest.raises(OptionError, match=r"vm\.toml:2: not TOML: byte 0xe9 is not UTF-8$"):
        parse(["--config", str(path)])
    path.write_bytes(b"#" * (MAX_CONFIG_SIZE + 1))
    with pytest.raises(OptionError, match=r"vm\.toml' has more than 1048576 bytes$"):
        parse(["--config", str(path)])
    path.write_bytes(b"a = " + b"[" * 100_000)
    with pytest.raises(OptionError, match=r"vm\.toml: not TOML: nested too deeply$"):
        parse(["--config", str(path)])
    path.write_text("socket-group = " + "9" * 5000)
    with pytest.raises(OptionError, match=r"vm\.toml: not TOML: a number has too many digits$"):
        parse(["--config", str(path)])
    with pytest.raises(OptionError, match=r"Cannot read the configuration '.*': Is a directory$"):
        parse(["--config", str(tmp_path)])


def test_wrong_elements_of_a_list(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"vm\.toml:1: 'qmp' holds 1\.5, expected a string"):
        parse([*_file(tmp_path, "qmp = [1.5]"), "--name", "v"])
    with pytest.raises(OptionError, match=r"vm\.toml:1: 'allow-uid' expects a user's number, got -1"):
        parse([*_file(tmp_path, "allow-uid = [-1]"), *LEAST])


def test_only_who_takes_over_goes_into_the_background() -> None:
    assert parse(["--take-over", "unix:/x", "--daemonize"]).daemonize
    with pytest.raises(OptionError, match=r"^--daemonize goes with --take-over: "):
        parse([*LEAST, "--daemonize"])


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"Cannot read the configuration '.*absent': No such file"):
        parse(["--config", str(tmp_path / "absent")])
