"""`vfiod run`: a vfiod of its own, the built-in device, and a hypervisor; each of the two may die.

The hypervisor is another vfiod, which attaches by vfio-user as any client does; and, where there is one, a real QEMU.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.test_examples import UNPRIVILEGED, environment, python_for_others
from tests.lab.small.guest import SEEN, SmallGuest, build_initrd, unavailable_reason

from vfiod.client.errors import ClientError
from vfiod.client.run import attach_arguments, main, memory_of, substituted

PATIENCE = 120.0
HYPERVISOR = """
import os, signal, sys
from vfiod.client.spawn import own_directory, own_server
from vfiod.client.sync import Client

what, *sockets = sys.argv[1:]
reading, writing = os.pipe()
# A signal is noted, and taken out below: this program is to be right whenever one comes.
signal.signal(signal.SIGTERM, lambda *_: os.write(writing, b"t"))
signal.signal(signal.SIGUSR1, lambda *_: os.write(writing, b"u"))
options = ["--allow-connect"]
with (
    own_directory("hypervisor-") as place,
    own_server(place, options) as server,
    Client.connect(server.path) as client,
):
    for number, path in enumerate(sockets):
        client.device_add(driver="vfio-pci", id=f"d{number}", socket=path)
        value = client.region_read(device=f"d{number}", region="bar0", offset=0, size=4).value
        print(f"d{number} {value:#x}", flush=True)
    print("ready", server.pid, flush=True)
    while what == "wait" and os.read(reading, 1) == b"u":
        print("usr1", flush=True)
sys.exit(5 if what == "wait" else 7)
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """Short, since sockets are made in it; and empty at the end."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="vr-") as name:
        Path(name, "tmp").mkdir()
        yield Path(name)
        assert list(Path(name, "tmp").iterdir()) == [], "it leaves nothing"


def start(place: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "vfiod.client.program", "run", *arguments],
        env=os.environ | {"TMPDIR": str(place / "tmp")}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def hypervisor(what: str, *sockets: str) -> list[str]:
    return ["--", sys.executable, "-W", "error", "-c", HYPERVISOR, what, *sockets]


def wait_ready(process: subprocess.Popen[str]) -> int:
    """The pid of the hypervisor's own vfiod, once it has its devices."""
    assert process.stdout is not None
    while not (line := process.stdout.readline()).startswith("ready"):
        assert line, process.communicate()
    return int(line.split()[1])


def child_of(process: subprocess.Popen[str], word: str) -> int:
    """The child of a process that has this word in its command line."""
    (children,) = Path(f"/proc/{process.pid}/task").glob("*/children")
    (found,) = [pid for pid in children.read_text().split() if word in Path(f"/proc/{pid}/cmdline").read_text()]
    return int(found)


class TestLives:
    def test_the_device_is_there_and_the_status_is_kept(self, place: Path) -> None:
        process = start(place, "--mdev", "primer-pci", *hypervisor("once", "{export}"))
        out, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 7, err
        assert re.search(r"^d0 0x[0-9a-f]+$", out, re.MULTILINE)
        assert err.splitlines() == [
            "vfiod run: starting vfiod",
            f"vfiod run: starting {sys.executable} with mdev0",
            "vfiod run: mdev0: removing it",
        ]

    def test_two_devices_and_parameters(self, place: Path) -> None:
        devices = ["--mdev", "primer-pci,id=a,vectors=2", "--mdev", "primer-pci,id=b"]
        process = start(place, "--quiet", *devices, *hypervisor("once", "{export:b}", "{export:a}"))
        out, err = process.communicate(timeout=PATIENCE)
        assert (process.returncode, err) == (7, "")
        assert "d0 0x" in out and "d1 0x" in out

    def test_signals_are_forwarded(self, place: Path) -> None:
        process = start(place, "--quiet", "--mdev", "primer-pci", *hypervisor("wait", "{export}"))
        wait_ready(process)
        process.send_signal(signal.SIGUSR1)
        assert process.stdout is not None and process.stdout.readline() == "usr1\n"
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=PATIENCE)
        assert (process.returncode, err) == (5, "")

    def test_inherited_fds(self, place: Path) -> None:
        """An fd that was given to `vfiod run` is the hypervisor's (`-add-fd`, `-netdev tap,fd=`)."""
        reading, writing = os.pipe()
        with os.fdopen(reading) as ours:
            program = f"import os; os.write({writing}, b'mine')"
            command = ["--quiet", "--mdev", "primer-pci", "--", sys.executable, "-c", program]
            done = subprocess.run(
                [sys.executable, "-m", "vfiod.client.program", "run", *command],
                env=os.environ | {"TMPDIR": str(place / "tmp")}, pass_fds=[writing], check=False,
            )  # fmt: skip
            os.close(writing)
            assert (done.returncode, ours.read()) == (0, "mine")

    def test_vfiod_dies(self, place: Path) -> None:
        process = start(place, "--quiet", "--mdev", "primer-pci", *hypervisor("wait", "{export}"))
        wait_ready(process)
        os.kill(child_of(process, "vfiod.server"), signal.SIGKILL)
        _, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 5, "the hypervisor's, which SIGTERM has reached"
        assert "vfiod has ended (by signal 9) and the devices with it: ending the hypervisor" in err
        assert "Traceback" not in err

    def test_the_hypervisor_dies(self, place: Path) -> None:
        process = start(place, "--quiet", "--mdev", "primer-pci", "--", "sh", "-c", "kill -9 $$", "{export}")
        _, err = process.communicate(timeout=PATIENCE)
        assert (process.returncode, err) == (128 + 9, "")

    @pytest.mark.skipif(os.getuid() != 0, reason="needs root, to start vfiod as another user")
    def test_without_the_rights_of_root(self, place: Path) -> None:
        program = python_for_others()
        if program is None:
            pytest.skip("no interpreter here lies where other users can run it")
        place.chmod(0o755)
        (place / "tmp").chmod(0o755)
        look = "stat -c %u {export}; grep -l vfiod.server /proc/[0-9]*/cmdline >/dev/null"
        done = subprocess.run(
            [program, "-m", "vfiod.client.program", "run", "--user", str(UNPRIVILEGED), "--mdev", "primer-pci",
             "--", "sh", "-c", look],
            env=environment() | {"TMPDIR": str(place / "tmp")}, capture_output=True, text=True, check=False, cwd="/",
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (0, f"{UNPRIVILEGED}\n"), done.stderr


class TestTrouble:
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--mdev", "primer-pci", "--", "/nonexistent/qemu"], "Cannot run /nonexistent/qemu: No such file"),
            (["--mdev", "nonesuch", "--", "true"], "There is no mdev type 'nonesuch': "),
            (["--host", "ffff:ff:1f.7", "--", "true"], "There is no PCI device ffff:ff:1f.7"),
            (["--host", "1f.7,speed=9", "--", "true"], "got 'speed'"),
            (["--mdev", "primer-pci,vectors=many", "--", "true"], "vectors"),
            (["--mdev", "primer-pci,id", "--", "true"], "--mdev takes MDEV"),
            (["--mdev", "primer-pci,id=a", "--mdev", "primer-pci,id=a", "--", "true"], "Two devices are called 'a'"),
            (["--", "true", "{export}"], "the devices are none: give --host or --mdev"),
            (["--user", "nobody-of-that-name", "--", "true"], "there is no user"),
            (["--memory", "lots", "--", "true"], "--memory takes a size such as 512M"),
        ],
    )
    def test_one_sentence(self, place: Path, arguments: list[str], said: str) -> None:
        process = start(place, "--quiet", *arguments)
        out, err = process.communicate(timeout=PATIENCE)
        assert (process.returncode, out) == (1, "")
        assert said in err and err.startswith("vfiod run: ") and err.count("\n") == 1, err

    def test_no_hypervisor(self, capsys: pytest.CaptureFixture[str]) -> None:
        for arguments in (["--mdev", "primer-pci"], ["--mdev", "primer-pci", "--"]):
            with pytest.raises(SystemExit) as ended:
                main(arguments)
            assert ended.value.code == 2
            assert "the hypervisor is missing" in capsys.readouterr().err

    def test_interrupted_while_it_prepares(self, place: Path) -> None:
        """SIGTERM at any moment: nothing is left (the fixture looks), whatever the status."""
        process = start(place, "--mdev", "primer-pci", *hypervisor("wait", "{export}"))
        assert process.stderr is not None and "starting vfiod" in process.stderr.readline()
        process.terminate()
        _, err = process.communicate(timeout=PATIENCE)
        assert process.returncode in (5, 128 + signal.SIGTERM), err


class TestWords:
    def test_placeholders(self) -> None:
        one, two = {"a": Path("/s/a")}, {"a": Path("/s/a"), "b": Path("/s/b")}
        device = '{"driver":"vfio-user-pci","socket":{"type":"unix","path":"{export}"}}'
        assert substituted([device], one, Path("/q")) == [device.replace("{export}", "/s/a")]
        assert substituted(["{export:b},{qmp}", "{other}"], two, Path("/q")) == ["/s/b,/q", "{other}"]
        with pytest.raises(ClientError, match=r"the devices are a, b: say \{export:ID\}"):
            substituted(["{export}"], two, Path())
        with pytest.raises(ClientError, match="There is no device 'c'; the devices are a, b"):
            substituted(["{export:c}"], two, Path())

    @pytest.mark.parametrize(
        ("words", "size"),
        [
            (["qemu-system-x86_64", "-m", "1G"], 1 << 30),
            (["/usr/bin/qemu-system-x86_64", "-m", "128"], 128 << 20),
            (["x", "-m", "size=2G,slots=2,maxmem=8G"], 8 << 30),
            (["x", "-m", "1G", "-m", "512M"], 512 << 20),
            (["qemu-system-aarch64"], 128 << 20),
            (["crosvm", "run"], 0),
        ],
    )
    def test_memory(self, words: list[str], size: int) -> None:
        assert memory_of(words) == size

    def test_attached(self) -> None:
        assert attach_arguments({"a": Path("/s/a")}) == [
            "-device", '{"driver": "vfio-user-pci", "id": "a", "socket": {"type": "unix", "path": "/s/a"}}'
        ]  # fmt: skip


@pytest.mark.qemu
def test_a_real_qemu(place: Path) -> None:
    """One command, from a device to a Linux guest that uses it: registers, mapped memory, MSI, INTx, DMA."""
    reason = unavailable_reason()
    if reason is not None:
        (pytest.fail if os.environ.get("VFIOD_LAB_REQUIRED", "") not in ("", "0") else pytest.skip)(reason)
    guest = SmallGuest(place, build_initrd(place), [])
    process = start(place, "--mdev", "primer-pci", "--attach", "qemu", "--", *guest.arguments)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, out + err + guest.tails()
    findings = guest.findings()
    assert [one for one in findings if not one.ok] == []
    assert [one.name for one in findings if one.name in SEEN] == list(SEEN)
