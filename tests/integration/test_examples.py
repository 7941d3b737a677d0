"""The examples, as docs/ccw.md and examples/README.md have them. With a real device they run in the kernel lab."""

from __future__ import annotations

import os
import runpy
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vfiod.client import Client
from vfiod.client.spawn import own_server

EXAMPLES = Path(__file__).parents[2] / "examples"
UNPRIVILEGED = 65533  # nobody's, and not the overflow uid, as which vfiod refuses to run


def run(name: str, *arguments: object, tmp: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name), *map(str, arguments)],
        env=os.environ | {"TMPDIR": str(tmp)}, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


def python_for_others() -> str | None:
    """An interpreter, with this one's packages, that an unprivileged user can run; None where there is none."""
    for program in (sys.executable, "/usr/bin/python3"):
        code = (
            f"import sys, msgspec, jsonrpcserver, vfiod.server; assert sys.version_info[:2] == {sys.version_info[:2]}"
        )
        try:
            done = subprocess.run(
                [program, "-c", code], user=UNPRIVILEGED, group=UNPRIVILEGED, extra_groups=[],
                env=environment(), cwd="/", capture_output=True, check=False,
            )  # fmt: skip
        except OSError:
            continue
        if done.returncode == 0:
            return program
    return None


def environment() -> dict[str, str]:
    """Ours, with everything this interpreter can import."""
    return dict(os.environ) | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


class TestManager:
    def test_demo(self, tmp_path: Path) -> None:
        done = run("manager.py", "--demo", tmp=tmp_path)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
        for said in (
            "dev0 is running", "it is 1234:f10d", "bar2: 0x100000 bytes, can be mapped", "2 MiB of guest memory",
            "msi works, direct: 1 interrupt", "it was reset", "released: True", "everything is as it was",
        ):  # fmt: skip
            assert said in done.stdout
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.skipif(os.getuid() != 0, reason="needs root, to start vfiod as another user")
    def test_an_unprivileged_vfiod(self, tmp_path: Path) -> None:
        program = python_for_others()
        if program is None:
            pytest.skip("no interpreter here lies where other users can run it")
        done = subprocess.run(
            [program, str(EXAMPLES / "manager.py"), "--demo", "--uid", str(UNPRIVILEGED)],
            env=environment() | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
        assert f"uid {UNPRIVILEGED}" in done.stdout

    def test_no_such_device(self, tmp_path: Path) -> None:
        """The failure comes after vfiod was started: it ends too, and nothing is left."""
        done = run("manager.py", "ffff:ff:1f.7", tmp=tmp_path)
        assert done.returncode == 1
        assert "There is no PCI device ffff:ff:1f.7" in done.stderr
        assert "Traceback" not in done.stderr
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("arguments", [(), ("--demo", "0000:00:00.0"), ("--demo", "--bind")])
    def test_nonsense(self, tmp_path: Path, arguments: tuple[str, ...]) -> None:
        assert run("manager.py", *arguments, tmp=tmp_path).returncode == 2


class TestHypervisor:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Iterator[Path]:
        with own_server(tmp_path, name="vm1") as server:
            yield server.path

    def add(self, path: Path, **parameters: int) -> None:
        with Client.connect(path, timeout=60) as client:
            uuid = client.mdev_create(parent="primer", type="primer-pci", parameters=dict(parameters)).uuid
            client.device_add(driver="vfio-pci", id="dev0", mdev=uuid)

    def test_it_attaches(self, path: Path, tmp_path: Path) -> None:
        self.add(path, vectors=2)
        done = run("hypervisor.py", path, "dev0", tmp=tmp_path)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
        assert "bar2 at offset 0x0 is mapped, 1048576 bytes" in done.stdout
        assert "2 of 2 MSI vectors, direct" in done.stdout
        assert "vector 1 arrived: {1: 1}" in done.stdout
        with Client.connect(path, timeout=60) as client, client.events("DEVICE_DELETED") as deleted:
            client.device_del(id="dev0")
            deleted.get(timeout=60)

    def test_it_stays_until_the_device_goes(self, path: Path, tmp_path: Path) -> None:
        self.add(path)
        child = subprocess.Popen(
            [sys.executable, str(EXAMPLES / "hypervisor.py"), str(path), "dev0", "--stay"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            with Client.connect(path, timeout=60) as client:
                assert child.stdout is not None
                while "waiting for interrupts" not in (line := child.stdout.readline()):
                    assert line, child.communicate()
                client.device_del(id="dev0", force=True)
                out, err = child.communicate(timeout=120)
        finally:
            child.kill()
            child.wait()
        assert "wanted back" in out, out + err

    def test_no_such_device(self, path: Path, tmp_path: Path) -> None:
        done = run("hypervisor.py", path, "nobody", tmp=tmp_path)
        assert done.returncode == 1
        assert "Device 'nobody' not found" in done.stderr


class TestKvm:
    @pytest.mark.parametrize("driver", ["vfio-platform", "vfio-pci"])
    def test_a_level_interrupt_into_a_guest_and_back(self, tmp_path: Path, driver: str) -> None:
        done = run("kvm_irqfd.py", "--driver", driver, tmp=tmp_path)
        if done.returncode == 77:
            pytest.skip(done.stdout.strip())
        assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
        for said in (
            "line 5, direct", "has line 5 up", "the guest handles it", "it came again after the guest's EOI",
            "the line is down after the EOI", "three more",
        ):  # fmt: skip
            assert said in done.stdout
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(("reason", "port"), [(2, 0xE2), (8, 0xE1), (5, 0)], ids=["port", "shutdown", "halted"])
    def test_a_guest_that_does_something_else_is_a_fault_and_no_reason_to_skip(self, reason: int, port: int) -> None:
        """Only a guest that never gets ready means that there is no KVM."""
        example = runpy.run_path(str(EXAMPLES / "kvm_irqfd.py"))
        run = struct.pack("<8xI22xH", reason, port)
        with pytest.raises(OSError, match=f"was to write to port 0xe1.*exit reason {reason}"):
            example["look"](run, 0xE1)
        example["look"](struct.pack("<8xI22xH", 2, 0xE1), 0xE1)


class TestChannelProgram:
    def test_the_disk_and_the_terminal(self, tmp_path: Path) -> None:
        done = run("channel_program.py", tmp=tmp_path)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
        assert done.stdout.splitlines() == [
            "disk: device 0200, enabled, interruption subclass 0",
            "disk: channel paths 00; available 0x80, operational 0xff, last used 0x80",
            "disk: status: no status (idle)",
            "disk: control unit 6310-80, device 9336-10",
            "disk: ended normally",
            "disk: blocks 7 to 9: ended normally",
            "disk: block 7, block 8, block 9",
            "terminal: control unit 3270-00, device 3278-02",
            "terminal: ended normally",
            "terminal: written: ended normally",
            "operator: sees 'YOUR NAME?'",
            "terminal: unsolicited: attention",
            "terminal: the operator entered 'ADA'",
            "done",
        ]
        assert list(tmp_path.iterdir()) == []

    def test_a_device_that_is_none(self, tmp_path: Path) -> None:
        with own_server(tmp_path, name="vm1") as server:
            done = run("channel_program.py", server.path, "nobody", tmp=tmp_path)
        assert done.returncode == 1
        assert "Device 'nobody' not found" in done.stderr


class TestMdevParent:
    def test_it_throws(self, tmp_path: Path) -> None:
        done = run("mdev_parent.py", tmp=tmp_path)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
        said = done.stdout.splitlines()
        assert said[0] == "casino makes dice: One die; 8 available"
        assert said[1].endswith("EINVAL: 'sides' is a number from 2 to 255, got 1")
        throws = [int(word) for word in said[2].removeprefix("thrown: ").split()]
        assert len(throws) == 10 and all(1 <= one <= 20 for one in throws)
        assert said[3] == "guessed right: 1 interrupt"
