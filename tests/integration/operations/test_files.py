"""The units and the files of a package, as systemd's own programs judge them, where these are installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SYSTEMD = ROOT / "examples" / "systemd"
PACKAGING = ROOT / "examples" / "packaging"
PATIENCE = 120

STATED = re.compile(r"of systemd 252 says (\d\.\d)")


def _needs(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")


@pytest.mark.parametrize("page", ["operations.md", "sandbox.md"])
def test_the_unit_is_as_safe_as_the_manual_says(page: str) -> None:
    _needs("systemd-analyze")
    stated = STATED.search((ROOT / "docs" / page).read_text())
    assert stated is not None
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(SYSTEMD / "vfiod@.service")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    if "unrecognized option" in ran.stderr:
        pytest.skip("this systemd-analyze is older than 250")
    found = re.search(r"Overall exposure level for \S+: (\d+\.\d)", ran.stdout)
    assert found is not None, ran.stdout + ran.stderr
    assert float(found[1]) <= float(stated[1])


def test_systemd_knows_every_line_of_the_units(tmp_path: Path) -> None:
    _needs("systemd-analyze")
    for unit in ("vfiod@.service", "vfiod@.socket"):
        # The program need not be installed here: another stands for it, and its words stay.
        text = (SYSTEMD / unit).read_text().replace("/usr/bin/vfiod", "/bin/true")
        (tmp_path / unit.replace("@", "@x")).write_text(text.replace("%i", "x").replace("vfiod@x.", "vfiod@x."))
    replace = (SYSTEMD / "replace.conf").read_text().replace("/usr/bin/vfiod", "/bin/true").replace("%i", "x")
    (tmp_path / "vfiod@x.service.d").mkdir()
    (tmp_path / "vfiod@x.service.d" / "replace.conf").write_text(replace)
    ran = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "./vfiod@x.service", "./vfiod@x.socket"],
        cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    ours = [line for line in ran.stderr.splitlines() if "vfiod@" in line]
    assert ours == []


def test_systemd_takes_the_users_and_directories(tmp_path: Path) -> None:
    _needs("systemd-sysusers")
    ran = subprocess.run(
        ["systemd-sysusers", "--dry-run", f"--root={tmp_path}", str(PACKAGING / "vfiod.sysusers")],
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    if "unrecognized option" in ran.stderr:
        pytest.skip("this systemd-sysusers is older than 250")
    assert ran.returncode == 0, ran.stderr
    assert "vfiod" in ran.stdout + ran.stderr
