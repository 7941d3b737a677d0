"""The wheel: built by pip as anybody builds it, installed alone in a new environment, and run from there."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PATIENCE = 600

ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def _run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("pip") is None:
        pytest.skip("this environment has no pip")
    place = tmp_path_factory.mktemp("wheel")
    built = _run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", place, ROOT, cwd=place)
    if built.returncode and "hatchling" in built.stderr and "No matching distribution" in built.stderr:
        pytest.skip("hatchling, which builds the wheel, cannot be had: no package index here")
    assert built.returncode == 0, built.stderr
    return next(iter(place.glob("vfiod-*.whl")))


def test_it_has_every_module_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    ours = set()
    for root in ("protocol", "server", "client"):
        listed = subprocess.run(
            ["git", "-C", ROOT / root, "ls-files", "vfiod"], capture_output=True, text=True, check=False
        )
        if listed.returncode:
            pytest.skip("not a checkout: what belongs to it is not known")
        ours |= set(listed.stdout.split())
    assert ours <= names
    assert all(name.startswith("vfiod/") for name in names)


def test_its_programs_work_in_an_environment_of_their_own(wheel: Path, tmp_path: Path) -> None:
    assert _run(sys.executable, "-m", "venv", "--without-pip", "new", cwd=tmp_path).returncode == 0
    python = tmp_path / "new" / "bin" / "python"
    place = Path(
        _run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).stdout.strip()
    )
    installed = _run(
        sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel,
        cwd=tmp_path,
    )  # fmt: skip
    assert installed.returncode == 0, installed.stderr
    # What vfiod depends on comes from here; vfiod itself does not: the .pth of an editable one is not read there.
    spec = importlib.util.find_spec("msgspec")
    assert spec is not None and spec.origin is not None
    (place / "dependencies.pth").write_text(f"{Path(spec.origin).parents[1]}\n")
    found = _run(python, "-c", "import vfiod; print(*vfiod.__path__)", cwd=tmp_path)
    assert found.stdout.split() == [str(place / "vfiod")]
    program = tmp_path / "new" / "bin" / "vfiod"
    version = _run(program, "--version", cwd=tmp_path)
    assert (version.returncode, version.stdout.split()[0]) == (0, "vfiod"), version.stderr
    assert _run(program, "completion", "bash", cwd=tmp_path).stdout.startswith("# bash completion")
    assert "usage: vfiod serve" in _run(program, "serve", "--help", cwd=tmp_path).stdout
    demo = _run(program, "demo", "--quiet", cwd=tmp_path)
    assert demo.returncode == 0, demo.stdout + demo.stderr
