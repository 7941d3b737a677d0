"""A process that has closed its sandbox as the server does can open nothing, execute nothing, connect nowhere."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from .attacks import ATTACKS, DEADLY

PROGRAM = Path(__file__).with_name("attacks.py")


def _try(name: str, here: Path) -> tuple[str, int]:
    (here / "there").touch()
    ran = subprocess.run(
        [sys.executable, str(PROGRAM), str(here), name], stdout=subprocess.PIPE, text=True, timeout=60, check=False
    )
    return ran.stdout.strip(), ran.returncode


def test_what_the_server_needs_works(tmp_path: Path) -> None:
    assert _try("works", tmp_path) == ("done", 0)


@pytest.mark.parametrize("name", [name for name in ATTACKS if name not in DEADLY])
def test_an_attack_is_refused(name: str, tmp_path: Path) -> None:
    said, status = _try(name, tmp_path)
    assert status == 0
    assert said in ("EACCES", "EPERM")


@pytest.mark.parametrize("name", DEADLY)
def test_an_attack_ends_the_process(name: str, tmp_path: Path) -> None:
    assert _try(name, tmp_path) == ("", -signal.SIGSYS)
