"""`vfiod monitor` at a terminal, seen on its screen."""

from __future__ import annotations

import signal
import termios
from collections.abc import Callable
from pathlib import Path

import pytest

from vfiod.client import Client
from vfiod.client.spawn import OwnServer, own_server

from .screen import Screen

Terminal = Callable[..., Screen]
Picture = Callable[..., None]
PROMPT = "(vm1)"


def test_a_table_a_drawing_and_json(server: OwnServer, device: str, terminal: Terminal, picture: Picture) -> None:
    person = terminal("monitor", server.path)
    person.see("Connected to vm1", PROMPT)
    person.type("query-commands\r")
    person.see("system_reset")
    person.type("\x0cquery-devices\r")
    person.see("Not shown: ", "json COMMAND")
    person.type("query-topology format=tree\r")
    person.see("machine vm1")
    person.until(lambda text: text.endswith(PROMPT), "the prompt")
    person.type("json query-objects\r")
    person.see("[]")
    person.type("region-read device=nic0 region=config offset=0 size=4\r")
    picture(person, "monitor-replies", "vfiod monitor vm1.sock", ("query-devices", "running", "vfio-pci", '"value"'))


def test_completion(server: OwnServer, device: str, terminal: Terminal, picture: Picture) -> None:
    person = terminal("monitor", server.path, columns=90, lines=20)
    person.see(PROMPT)
    person.type("device\t")
    person.see("device_add", "device_del", "device-reset", "device-export-add")
    picture(person, "monitor-completion", "Tab", ("device_add", "device_del", "device-export-add", "device-reset"))
    person.type("\x03")
    person.type("device-reset id=n\t")
    person.see("device-reset id=nic0")
    person.type("\r")
    person.see("DEVICE_RESET")
    person.type('{"execute": "device-re\t')
    person.see('{"execute": "device-reset"')
    person.type(', "arguments": {"id": "n\t')
    person.see('"id": "nic0"')
    person.type("}}\x1bOP")  # F1
    person.see("device-reset", "id: str", "force (optional)")
    person.type("\x03irq-start mo\t\t")
    person.see("mode=")


def test_json_over_lines_and_events_above_the_line(
    server: OwnServer, device: str, terminal: Terminal, picture: Picture
) -> None:
    person = terminal("monitor", server.path, columns=80, lines=24)
    person.see(PROMPT)
    person.type('{"execute": "region-read",\r')
    person.type(' "arguments": {"device": "nic0", "region": "config",\r')
    person.see('"region": "config",')
    with Client.connect(server.path, timeout=60) as other:
        other.device_reset(id=device)
    person.see("| ", "DEVICE_RESET")
    shown = person.until(lambda text: text.rfind('{"execute"') > text.rfind("DEVICE_RESET"), "the line below the event")
    below = shown[shown.rfind('{"execute"') :]
    assert '"arguments": {"device": "nic0"' in below, "what was typed is still there, whole, below the event"
    picture(person, "monitor-events", "An event while a line is typed", ("DEVICE_RESET", "nic0", "execute"))
    person.type(' "offset": 0, "size": 4}}\r')
    person.see('{"value": ')


@pytest.mark.parametrize("how", ["environment", "option"])
def test_no_colour(server: OwnServer, terminal: Terminal, how: str) -> None:
    option, environment = (["--color", "never"], {}) if how == "option" else ([], {"NO_COLOR": "1"})
    person = terminal("monitor", *option, server.path, environment=environment)
    person.see(PROMPT)
    person.type("query-name\r")
    person.see('{"name": "vm1"}')
    cells = [cell for row in person.screen.buffer.values() for cell in row.values()]
    assert {(cell.fg, cell.bg) for cell in cells} == {("default", "default")}


def test_colour(server: OwnServer, terminal: Terminal) -> None:
    person = terminal("monitor", server.path)
    person.see(PROMPT)
    person.type("query-name\r")
    person.see('{"name": "vm1"}')
    colours = {cell.fg for row in person.screen.buffer.values() for cell in row.values()}
    assert {"cyan", "green"} <= colours


def test_twenty_columns(server: OwnServer, device: str, terminal: Terminal) -> None:
    person = terminal("monitor", server.path, columns=20, lines=30)
    person.see(PROMPT)
    person.type("query-name\r")
    person.see('"vm1"')
    person.type("query-devices\r")
    person.until(lambda text: text.endswith(PROMPT), "the prompt after the reply")
    person.type("\x0cdevice-reset id=n\t")
    person.until(lambda text: text.replace("\n", "").replace(" ", "").endswith("id=nic0"), "the completion")
    person.type("\r")
    person.until(lambda text: "DEVICE_RESET" in text.replace("\n", ""), "the event")
    person.type("\x04")
    assert person.end() == 0


def test_ctrl_c(server: OwnServer, terminal: Terminal) -> None:
    """It cancels the line; the wait for a reply; twice, it leaves. The server stays."""
    person = terminal("monitor", server.path)
    person.see(PROMPT)
    person.type("query-na\x03")
    person.see("Ctrl-C again leaves")
    person.type("query-name\r")
    person.see('{"name": "vm1"}')
    server.process.send_signal(signal.SIGSTOP)
    try:
        person.type("query-uuid\r")
        terminal_of = person.child.child_fd
        person.until(lambda _: bool(termios.tcgetattr(terminal_of)[3] & termios.ISIG), "that it waits")
        person.child.sendintr()
        person.see("No longer waiting")
    finally:
        server.process.send_signal(signal.SIGCONT)
    person.until(lambda text: text.endswith(PROMPT), "the prompt")
    person.type("query-status\r")
    person.see("running")
    person.type("quit\r")
    person.see("Really?")
    person.type("\x03")
    person.see("The server runs on")
    person.type("\x03")
    person.until(lambda text: text.count("Ctrl-C again") == 3, "the third advice")
    person.type("\x03")
    assert person.end() == 0
    assert server.process.poll() is None


def test_fds_by_path_survive_a_new_server(tmp_path: Path, home: Path) -> None:
    (tmp_path / "ram").write_bytes(bytes(8192))
    with own_server(tmp_path, name="one"):
        person = Screen("monitor", "--fd", f"ram={tmp_path}/ram", tmp_path / "qmp.sock", home=home, columns=200)
        person.see("Connected to one", "ram: file", "(one)")
        person.type(f"getfd more={tmp_path}/ram\r")
        person.see("more: file")
        person.type("query-fds\r")
        person.until(lambda text: text.count("more") == 3, "the name in the table")
    with person:
        person.see("Trying to connect again", "(one?)")
        person.type("half a li")
        with own_server(tmp_path, name="two"):
            person.see("Connected to two", "(two) half a li")
            person.type("\x03dma-map iova=0 size=4K fd=ram\r")
            person.see('"size": 4096')
            person.type("exit\r")
            assert person.end() == 0


def test_human(server: OwnServer, device: str, terminal: Terminal, picture: Picture) -> None:
    person = terminal("monitor", "-H", server.path, columns=90, lines=40)
    person.see(PROMPT)
    person.type("info dev\t\t")
    person.see("devices", "device-exports")
    person.type("\x03info irqs\r")
    person.see("intx")
    person.type("\x0cregion-read n\t")
    person.see("region-read nic0")
    person.type(" config 0 4\r")
    person.see("value")
    person.type("device_add vfio-pci,id=x,mdev=nonsense\r")
    picture(person, "monitor-human", "vfiod monitor -H vm1.sock", ("region-read nic0", "value", "Error:"))


def test_over_a_bus(tmp_path: Path, home: Path) -> None:
    tmp_path.chmod(0o700)
    bus, events = f"ipc:{tmp_path}/bus", f"ipc:{tmp_path}/events"
    with (
        own_server(tmp_path, ["--bus", bus, "--events", events], name="vm8"),
        Screen("monitor", "--bus-events", events, bus, home=home) as person,
    ):
        person.see("Connected to vm8", "(vm8)")
        person.type("mdev-create parent=primer type=primer-pci uuid=00000000-0000-4000-8000-000000000001\r")
        person.see('"uuid"')
        person.type("device_add driver=vfio-pci id=nic0 mdev=0000\t")
        person.see("mdev=00000000-0000-4000-8000-000000000001")
        person.type("\r")
        person.see("DEVICE_ADDED")
        person.type("getfd x=/dev/null\r")
        person.see("A bus carries no fds")
        person.type("\x04")
        assert person.end() == 0


def test_nobody_there(tmp_path: Path, home: Path) -> None:
    with Screen("monitor", tmp_path / "no.sock", home=home, columns=200) as person:
        person.see("ENOENT")
        assert person.end() == 1
