"""docs/pci.md on a real kernel, line by line; only the address and the group's number are another's."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.lab.guest import pci
from tests.lab.guest.resets import running_vms
from tests.lab.guest.vm import Vm
from tests.lab.topologies import EDU_ROOT

from vfiod.client.program import main

MACHINE = "edu"
PAGE = Path(__file__).parents[3] / "docs" / "pci.md"


@pytest.fixture
def vm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vm]:
    running = running_vms(tmp_path_factory)
    yield next(running)
    running.close()


def test_the_page(vm: Vm, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(re.findall(r"^```sh run-by=[^\n]*\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL))
    text = text.replace("0000:03:00.0", EDU_ROOT).replace("/dev/vfio/26", f"/dev/vfio/{pci.group_of(EDU_ROOT)}")
    bind, serve, *with_server, unbind = text.splitlines()
    assert serve == "vfiod serve --name vm1 --qmp unix:vm1.sock &"
    (tmp_path / "vm1.sock").symlink_to(vm.path)
    monkeypatch.chdir(tmp_path)
    before = pci.driver_of(EDU_ROOT)
    said: dict[str, str] = {}

    def typed(line: str) -> None:
        """In this process: to start one more takes seconds here."""
        program, *arguments = shlex.split(line)
        assert program == "vfiod"
        status = main(arguments)
        out, err = capsys.readouterr()
        assert status == 0, (line, out, err)
        said[line] = out

    typed(bind)
    try:
        for line in with_server:
            typed(line)
        vm.process.wait()
    finally:
        vm.process.kill()  # the kernel would not let a device go that somebody has
        vm.process.wait()
        typed(unbind)
    (identity,) = [out for line, out in said.items() if "region-read" in line]
    assert str(0x11E8_1234) in identity
    assert pci.driver_of(EDU_ROOT) == before
