"""``docs/libvirt.md``: its XML against libvirt's schema, its VM started by libvirt's QEMU driver, its hook around it.

libvirt's driver runs inside ``virt-qemu-run`` (``qemu:///embed``), as an ordinary user's, so that nothing of this
machine's libvirt is touched: its files are below a directory of the test.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from tests.lab.places import REPO, find_kernel
from tests.lab.small.guest import SEEN, WAIT_SECONDS, SmallGuest, build_initrd, find_program, unavailable_reason

from vfiod.client.spawn import own_server

pytestmark = pytest.mark.qemu

PROGRAMS = ("virsh", "virt-qemu-run", "xmllint", "unshare")
SCHEMA = Path("/usr/share/libvirt/schemas/domain.rng")
QEMU_XML = "http://libvirt.org/schemas/domain/qemu/1.0"
PAGE = (REPO / "docs" / "libvirt.md").read_text()

# libvirt wants to be an ordinary user, or its own "libvirt-qemu", whom only its daemon's package makes. In a user
# namespace root's files are an ordinary user's.
ORDINARY = ["unshare", "--user", "--map-user=1000", "--map-group=1000"] if os.getuid() == 0 else []


@pytest.fixture
def directory() -> Iterator[Path]:
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    reason = f"not installed: {', '.join(missing)} (run tests/lab/setup)" if missing else unavailable_reason()
    if reason is None and subprocess.run([*ORDINARY, "true"], check=False, capture_output=True).returncode:
        reason = "this machine allows no user namespaces"
    if reason is not None:
        pytest.skip(f"no libvirt here: {reason}")
    path = Path(tempfile.mkdtemp(prefix="vfiod-"))  # short: a Unix socket's path may have 107 bytes
    yield path
    shutil.rmtree(path)


def block(language: str) -> str:
    """The page's first block of a language."""
    found = re.search(rf"^```{language} [^\n]*\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert found, language
    return found[1]


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def domain(directory: Path, initrd: Path, guest: SmallGuest) -> Path:
    """The page's VM; only places, the memory's size, emulation instead of KVM, and what it boots are ours."""
    ElementTree.register_namespace("qemu", QEMU_XML)
    root = ElementTree.fromstring(block("xml").replace("/run/vfiod/vm1", str(directory)))
    root.set("type", "qemu")
    changes = {"memory": "160", "vcpu": "1", "devices/emulator": str(directory / "qemu.sh")}
    for path, value in changes.items():
        element = root.find(path)
        assert element is not None
        element.text = value
    start, devices = root.find("os"), root.find("devices")
    assert start is not None and devices is not None
    line = "console=ttyS0 panic=-1 quiet vfiod.then=wait"
    for name, value in (("kernel", str(find_kernel())), ("initrd", str(initrd)), ("cmdline", line)):
        ElementTree.SubElement(start, name).text = value
    serial = ElementTree.SubElement(devices, "serial", type="file")
    ElementTree.SubElement(serial, "source", path=str(guest.console))
    where = directory / "vm1.xml"
    ElementTree.ElementTree(root).write(where)
    return where


def valid(path: Path) -> None:
    done = subprocess.run(
        ["xmllint", "--noout", "--relaxng", SCHEMA, path], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_guide_is_true(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = directory / "shown.xml"
    shown.write_text(block("xml"))
    valid(shown)

    initrd = build_initrd(directory)
    guest = SmallGuest(directory, initrd, [])
    script(directory / "qemu.sh", f'exec {find_program()} "$@"')
    settings, home = directory / "embed/etc", directory / "home"
    settings.mkdir(parents=True)
    home.mkdir()
    (settings / "qemu.conf").write_text('stdio_handler = "file"\n')  # virtlogd is no part of this
    vm = domain(directory, initrd, guest)
    valid(vm)
    for name in ("HOME", "XDG_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(home))
    programs = directory / "bin"
    programs.mkdir()
    script(programs / "vfiod", f'exec {sys.executable} -m vfiod.client.program "$@"')
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    argv = subprocess.run(
        [*ORDINARY, "virsh", "-q", "-c", f"qemu:///embed?root={directory / 'embed'}",
         "domxml-to-native", "qemu-argv", "--xml", vm],
        check=False, capture_output=True, text=True, timeout=WAIT_SECONDS,
    )  # fmt: skip
    assert argv.returncode == 0, argv.stderr
    assert f'"vfio-user-pci","id":"d0","bus":"pcie.0","addr":"0x10","socket":{{"type":"unix","path":"{directory}' in (
        argv.stdout
    )
    assert '"qom-type":"memory-backend-memfd"' in argv.stdout and '"share":true' in argv.stdout

    (directory / "vm1.commands").write_text(block("text").replace("/run/vfiod/vm1", str(directory)))

    def hook(operation: str, sub: str, name: str = "vm1") -> None:
        """As libvirt calls it."""
        done = subprocess.run(
            [REPO / "examples/libvirt/qemu", name, operation, sub, "-"], input=vm.read_text(), text=True, check=False,
            capture_output=True, timeout=WAIT_SECONDS,
            env=os.environ | {"VFIOD_RUN": str(directory), "VFIOD_ETC": str(directory)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    with own_server(directory, ["--qmp", f"unix:{directory / 'vm1.qmp'}"], name="vm1") as server:
        for name in ("vm1", "another"):
            hook("prepare", "begin", name)
            hook("start", "begin", name)
        guest.arguments = [*ORDINARY, "virt-qemu-run", "--root", str(directory / "embed"), str(vm)]
        with guest:
            try:
                findings = guest.wait_done()
            finally:  # ends QEMU too, which is no child of ours
                assert guest.process is not None
                guest.process.terminate()
                ended = guest.process.wait()
        assert ended == 0, guest.tails()
        assert [one for one in findings if not one.ok] == []
        assert [one.name for one in findings if one.name in SEEN] == list(SEEN)
        assert server.process.poll() is None
        hook("release", "end")
        assert server.wait(WAIT_SECONDS) == 0
        assert "Traceback" not in server.messages(), server.messages()
