"""`vfiod call`, `monitor` and `watch` as a shell and a person use them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pexpect  # type: ignore[import-untyped]
import pytest

from vfiod.client import Client
from vfiod.client.spawn import OwnServer, own_server

PROGRAM = [sys.executable, "-m", "vfiod.client.program"]


def vfiod(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *map(str, arguments)], input=stdin, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.fixture
def device(server: OwnServer) -> str:
    with Client.connect(server.path, timeout=30) as client:
        uuid = client.mdev_create(parent="primer", type="primer-pci").uuid
        client.device_add(driver="vfio-pci", id="dev0", mdev=uuid)
    return "dev0"


class TestCall:
    def test_a_result(self, server: OwnServer) -> None:
        done = vfiod("call", server.path, "query-name")
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(done.stdout) == {"name": "vm1"}
        assert vfiod("call", server.path, "query-name", "--compact", "--oob").stdout == '{"name": "vm1"}\n'

    @pytest.mark.parametrize("program", [["call"], ["monitor"]])
    def test_the_wrong_dialect_is_named(self, server: OwnServer, program: list[str]) -> None:
        """A JSON-RPC socket says nothing until it is spoken to: nobody waits for its greeting without a word."""
        query = ["query-name"] if program == ["call"] else []
        done = vfiod(*program, server.path.parent / "rpc.sock", *query)
        assert done.returncode == 1
        assert "speaks JSON-RPC, not QMP: give --jsonrpc" in done.stderr + done.stdout
        done = vfiod(*program, "--jsonrpc", server.path, *query, stdin="query-name\n")
        assert done.returncode == 1
        assert "speaks QMP, not JSON-RPC: leave out --jsonrpc" in done.stderr + done.stdout

    def test_jsonrpc(self, server: OwnServer) -> None:
        done = vfiod("call", "--jsonrpc", server.path.parent / "rpc.sock", "query-name")
        assert json.loads(done.stdout) == {"name": "vm1"}

    def test_an_error(self, server: OwnServer) -> None:
        done = vfiod("call", server.path, "device_del", "id=nobody")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == "vfiod call: DeviceNotFound: device_del: Device 'nobody' not found\n"

    def test_what_was_meant(self, server: OwnServer) -> None:
        done = vfiod("call", server.path, "query-statu")
        assert done.returncode == 1
        assert done.stderr.endswith(
            "The command query-statu has not been found; did you mean query-status or query-stats or query-fds?\n"
        )
        done = vfiod("call", server.path, "device_add", "driver=vfio-pci", "mdevv=x")
        assert done.stderr.endswith("Property 'vfio-pci.mdevv' not found; did you mean mdev?\n")

    def test_registers(self, server: OwnServer, device: str) -> None:
        place = (f"device={device}", "region=bar0", "offset=0x4", "size=4")
        assert vfiod("call", server.path, "region-write", *place, "value=0xff").returncode == 0
        assert json.loads(vfiod("call", server.path, "region-read", *place).stdout) == {"value": 0xFFFFFF00}

    def test_fds_in(self, server: OwnServer, tmp_path: Path) -> None:
        (tmp_path / "ram").write_bytes(bytes(65536))
        done = vfiod("call", server.path, "dma-map", "iova=0", "size=64K", "fd=r", "--fd", f"r={tmp_path}/ram")
        assert json.loads(done.stdout) == {"iova": 0, "size": 65536}
        done = vfiod("call", server.path, "add-fd", "--fd", f"r={tmp_path}/ram")
        assert json.loads(done.stdout)["kind"] == "file"

    def test_fds_out(self, server: OwnServer, device: str) -> None:
        arguments = ("call", server.path, "region-map", f"device={device}", "region=bar2")
        done = vfiod(*arguments)
        assert json.loads(done.stdout)["map-fd"] == 0
        assert re.search(r"map-fd = 0: /memfd:\S+ \(deleted\) \(1048576 bytes\)", done.stderr)
        code = "import json,os,sys; print(os.fstat(json.load(sys.stdin)['map-fd']).st_size)"
        done = vfiod(*arguments, "--run", f'{sys.executable} -c "{code}"')
        assert done.stdout == "1048576\n", done.stderr
        assert vfiod(*arguments, "--run", "exit 5").returncode == 5


class TestServe:
    def test_from_start_to_sigterm(self, tmp_path: Path) -> None:
        path = tmp_path / "sock"
        child = subprocess.Popen([*PROGRAM, "serve", "--name", "vm9", "--qmp", f"unix:{path}"])
        try:
            while not path.exists():
                assert child.poll() is None
            while vfiod("call", path, "query-name", "--compact").stdout != '{"name": "vm9"}\n':
                assert child.poll() is None
            command = Path(f"/proc/{child.pid}/cmdline").read_bytes().split(b"\0")
            assert b"vfiod.server" in command, "it became the server: nothing of the client is left in memory"
            child.terminate()
            assert child.wait(60) == 0
        finally:
            child.kill()
            child.wait()
        assert not path.exists()

    def test_a_bad_option(self, tmp_path: Path) -> None:
        done = vfiod("serve", "--name", "vm9")
        assert done.returncode == 2
        assert "--qmp" in done.stderr


class TestFilter:
    def test_lines(self, server: OwnServer) -> None:
        lines = 'query-name\n\n# a comment\n{"execute": "query-uuid"}\n{"exec-oob": "query-name"}'
        done = vfiod("monitor", server.path, stdin=lines)
        replies = [json.loads(line) for line in done.stdout.splitlines()]
        assert [next(iter(reply)) for reply in replies] == ["return"] * 3
        assert done.returncode == 0

    def test_the_first_error_ends_it(self, server: OwnServer) -> None:
        done = vfiod("monitor", server.path, stdin="query-name\nnope\nquery-name\n")
        replies = [json.loads(line) for line in done.stdout.splitlines()]
        assert [next(iter(reply)) for reply in replies] == ["return", "error"]
        assert done.returncode == 1

    def test_keep_going(self, server: OwnServer) -> None:
        done = vfiod("monitor", "--keep-going", server.path, stdin="nope\ndma-map iova\n{]\nquery-name\n")
        replies = [json.loads(line) for line in done.stdout.splitlines()]
        assert [next(iter(reply)) for reply in replies] == ["error", "error", "error", "return"]
        assert replies[0]["error"]["class"] == "CommandNotFound"
        assert done.returncode == 1

    def test_events(self, server: OwnServer, device: str) -> None:
        done = vfiod("monitor", "-e", server.path, stdin=f"device-reset id={device}\nquery-name\n")
        found = [json.loads(line) for line in done.stdout.splitlines()]
        assert any(line.get("event") == "DEVICE_RESET" and line["data"]["device"] == device for line in found)

    def test_human(self, server: OwnServer, device: str) -> None:
        done = vfiod("monitor", "-H", server.path, stdin="info devices\ninfo nonsense\ninfo devices\n")
        assert done.stdout.count(f"id {device}") == 1, "the second line is an error, and ends it"
        assert done.returncode == 1

    def test_json_over_lines_and_fds_by_path(self, server: OwnServer, tmp_path: Path) -> None:
        (tmp_path / "ram").write_bytes(bytes(8192))
        script = f"""getfd b={tmp_path}/ram
        {{"execute": "dma-map",
          "arguments": {{"iova": 0,

                         "size": 4096, "fd": "a"}}}}
        pass c={tmp_path}/nothing
        """
        done = vfiod("monitor", "--fd", f"a={tmp_path}/ram", server.path, stdin=script)
        replies = [json.loads(line) for line in done.stdout.splitlines()]
        assert replies[:2] == [{"return": {"kind": "file"}}, {"return": {"iova": 0, "size": 4096}}]
        assert "ENOENT" in replies[2]["error"]["desc"]
        assert done.returncode == 1

    def test_over_a_bus(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o700)
        with own_server(tmp_path, ["--bus", f"ipc:{tmp_path}/bus"], name="vm7"):
            done = vfiod("monitor", f"ipc:{tmp_path}/bus", stdin='query-name\n{"exec-oob": "query-status"}\nnope\n')
        replies = [json.loads(line) for line in done.stdout.splitlines()]
        assert replies[0] == {"return": {"name": "vm7"}}
        assert replies[1]["return"]["running"]
        assert replies[2]["error"]["class"] == "CommandNotFound"
        assert done.returncode == 1


class Terminal:
    """A person at a terminal."""

    def __init__(self, *arguments: object, home: Path) -> None:
        environment = os.environ | {"XDG_STATE_HOME": str(home), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
        words = [*PROGRAM[1:], *map(str, arguments)]
        self.child: Any = pexpect.spawn(
            PROGRAM[0], words, env=environment, encoding="utf-8", timeout=120, dimensions=(50, 200)
        )

    def see(self, pattern: str) -> str:
        self.child.expect(pattern)
        return str(self.child.after)

    def type(self, text: str) -> None:
        self.child.send(text)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def terminal(server: OwnServer, home: Path) -> Iterator[Terminal]:
    made = Terminal("monitor", server.path, home=home)
    made.see("Connected to vm1")
    made.see(r"\(vm1\)")
    yield made
    made.child.close(force=True)


class TestInteractive:
    def test_a_command_and_an_error(self, terminal: Terminal) -> None:
        terminal.type("query-status\r")
        terminal.see("running")
        terminal.type("device-del id=x\r")
        terminal.see("CommandNotFound")
        terminal.see("did you mean device_del")
        terminal.type("dma-map iova=many\r")
        terminal.see("takes an integer")

    def test_completion(self, terminal: Terminal, device: str) -> None:
        """Each key is answered by what is drawn: only the new characters."""
        terminal.type("device-res\t")
        terminal.see("device-res")
        terminal.see("et")
        terminal.type(" id=\t")
        terminal.see(device)
        terminal.type("\r")
        terminal.see("DEVICE_RESET")
        terminal.type("device_add on-re\t")
        terminal.see("quest=")

    def test_events_appear(self, terminal: Terminal, server: OwnServer) -> None:
        with Client.connect(server.path, timeout=30) as other:
            uuid = other.mdev_create(parent="primer", type="primer-pci").uuid
            other.device_add(driver="vfio-pci", id="seen", mdev=uuid)
        terminal.see("DEVICE_ADDED")
        terminal.see("seen")

    def test_fds(self, terminal: Terminal, tmp_path: Path) -> None:
        (tmp_path / "ram").write_bytes(bytes(4096))
        terminal.type(f"pass r={tmp_path}/ram\r")
        terminal.see("r: file")
        terminal.type("dma-map iova=0 size=4K fd=r\r")
        terminal.see("4096")
        terminal.type("pass nonsense\r")
        terminal.see("NAME=PATH")

    def test_leaving_leaves_the_server(self, terminal: Terminal, server: OwnServer, home: Path) -> None:
        terminal.type("quit\r")
        terminal.see("Really")
        terminal.type("\r")
        terminal.see("runs on")
        terminal.type("exit\r")
        terminal.see(pexpect.EOF)
        terminal.child.close()
        assert terminal.child.exitstatus == 0
        assert server.process.poll() is None
        history = home / "vfiod" / "history"
        assert "+quit" in history.read_text()
        assert history.stat().st_mode & 0o777 == 0o600

    def test_quit_means_the_server(self, terminal: Terminal, server: OwnServer) -> None:
        terminal.type("quit\r")
        terminal.see("Really")
        terminal.type("y\r")
        assert server.wait() == 0
        terminal.see("Trying to connect again")

    def test_control_d(self, terminal: Terminal) -> None:
        terminal.type("\x04")
        terminal.see(pexpect.EOF)

    def test_human(self, server: OwnServer, device: str, home: Path) -> None:
        human = Terminal("monitor", "-H", server.path, home=home)
        human.see(r"\(vm1\)")
        human.type("info devices\r")
        human.see("vfio-pci")
        human.child.close(force=True)

    def test_it_comes_back(self, tmp_path: Path, home: Path) -> None:
        with own_server(tmp_path, name="one"):
            person = Terminal("monitor", tmp_path / "qmp.sock", home=home)
            person.see(r"\(one\)")
        person.see("Trying to connect again")
        with own_server(tmp_path, name="two"):
            person.see("Connected to two")
            person.type("query-name\r")
            person.see('"two"')
        person.child.close(force=True)


class TestWatch:
    def test_once(self, server: OwnServer, device: str) -> None:
        with Client.connect(server.path, timeout=30) as client:
            client.irq_start(device=device, index="intx", mode="relayed").close()
            done = vfiod("watch", "--once", server.path)
        assert done.returncode == 0, done.stderr
        assert re.search(rf"{device} +running", done.stdout)
        assert re.search(rf"{device} intx +0 +relayed", done.stdout)

    def test_live(self, server: OwnServer, device: str, home: Path) -> None:
        watch = Terminal("watch", "--interval", "0.1", server.path, home=home)
        watch.see(device)
        with Client.connect(server.path, timeout=30) as client:
            client.device_reset(id=device)
        watch.see("DEVICE_RESET")
        watch.child.sendintr()
        watch.see(pexpect.EOF)
        watch.child.close()
        assert watch.child.exitstatus == 0
