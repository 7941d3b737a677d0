"""docs/pci.md on a real kernel, line by line; only the address and the group's number are another's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from tests.lab.guest import pci
from tests.lab.topologies import EDU_ROOT

from vfiod.client.spawn import accepts

MACHINE = "edu"
PAGE = Path(__file__).parents[3] / "docs" / "pci.md"
PATIENCE = 300.0
"""Seconds for what takes a second or two outside of an emulator."""


def test_the_page(tmp_path: Path) -> None:
    text = "".join(re.findall(r"^```sh run-by=[^\n]*\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL))
    text = text.replace("0000:03:00.0", EDU_ROOT).replace("/dev/vfio/26", f"/dev/vfio/{pci.group_of(EDU_ROOT)}")
    script = tmp_path / "vfiod"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m vfiod.client.program "$@"\n')
    script.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    server: subprocess.Popen[bytes] | None = None
    said: dict[str, str] = {}
    driver = Path(f"/sys/bus/pci/devices/{EDU_ROOT}/driver")
    before = driver.exists() and driver.resolve().name
    try:
        for line in text.splitlines():
            if line.endswith(" &"):
                server = subprocess.Popen(["sh", "-c", f"exec {line[:-2]}"], cwd=tmp_path, env=environment)
                deadline = time.monotonic() + PATIENCE
                while not accepts(tmp_path / "vm1.sock"):
                    assert server.poll() is None and time.monotonic() < deadline, line
                    time.sleep(0.1)
                continue
            done = subprocess.run(
                ["sh", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
                timeout=PATIENCE,
            )  # fmt: skip
            assert done.returncode == 0, (line, done.stdout, done.stderr)
            said[line] = done.stdout
        assert server is not None and server.wait(PATIENCE) == 0
    finally:
        if server is not None:
            server.kill()
            server.wait()
    (identity,) = [out for line, out in said.items() if "region-read" in line]
    assert str(0x11E8_1234) in identity
    assert (driver.exists() and driver.resolve().name) == before
