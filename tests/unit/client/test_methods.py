"""The generated methods: current, complete, typed."""

from __future__ import annotations

import inspect
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from vfiod.client import AsyncClient, Client
from vfiod.client.fds import HoldsFds
from vfiod.client.generate import generate, is_current
from vfiod.client.methods import values
from vfiod.client.methods.aio import AsyncMethods
from vfiod.client.methods.sync import Methods
from vfiod.protocol.catalogue import COMMANDS, CommandSpec

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", sorted(generate()))
def test_current(name: str) -> None:
    assert is_current(name, generate()[name]), "the catalogue has changed: run 'python -m vfiod.client.generate'"


@pytest.mark.parametrize(
    "edit", [("timeout=timeout", "timeout=None"), ("def getfd", "def getfds"), ('"""', '"""Not. ')]
)
def test_an_edit_is_seen(edit: tuple[str, str]) -> None:
    text = generate()["sync.py"]
    assert edit[0] in text
    assert not is_current("sync.py", text.replace(*edit, 1))


@pytest.mark.parametrize("spec", COMMANDS.values(), ids=COMMANDS)
def test_every_command(spec: CommandSpec) -> None:
    name = spec.name.replace("-", "_")
    plain, asynchronous = getattr(Methods, name), getattr(AsyncMethods, name)
    assert inspect.iscoroutinefunction(asynchronous)
    assert not inspect.iscoroutinefunction(plain)
    assert inspect.signature(plain) == inspect.signature(asynchronous), "the same names in both"
    assert plain.__doc__ == asynchronous.__doc__
    parameters = set(inspect.signature(plain).parameters)
    assert set(spec.arguments.__struct_fields__) <= parameters
    assert ("oob" in parameters) == spec.allow_oob
    hints = typing.get_type_hints(plain)
    assert hints["return"] == spec.returns or spec.name in values.OWN


def test_the_same_names_in_both_skins() -> None:
    def names(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    assert names(Client) - names(AsyncClient) == {"poll"}, "an asyncio client needs no polling"
    assert names(AsyncClient) - names(Client) == {"wait_closed"}


def test_results_with_fds_own_them() -> None:
    assert set(values.OWN) == {"irq-start", "region-map"}
    assert issubclass(values.RegionMapResult, HoldsFds)


def test_a_type_checker_sees_them(tmp_path: Path) -> None:
    program = tmp_path / "user.py"
    program.write_text(
        "from vfiod.client import AsyncClient, Client, FileDescriptor, VectorFds\n"
        "from vfiod.protocol.catalogue.memory import DmaMap, DmaMapResult\n"
        "from vfiod.protocol.catalogue.regions import RegionMap\n"
        "async def use(a: AsyncClient, c: Client, ram: FileDescriptor) -> None:\n"
        "    one: DmaMapResult = c.dma_map(iova=0, size=1, fd=ram)\n"
        "    two: DmaMapResult = await a.call(DmaMap(iova=0, size=1, fd='n'), fds={'n': ram})\n"
        "    three: FileDescriptor = c.call(RegionMap(device='d', region=0)).map_fd\n"
        "    c.irq_start(device='d', mode='relayed', eventfds=[VectorFds(vector=0, trigger=3)])\n"
        "    c.dma_map(iova='0', size=1)\n"  # line 9
        "    c.irq_start(mode='slow')\n"  # line 10
        "    await a.query_devices(oob=True, ids=3)\n"  # line 11
        "    c.region_read(device='d', region='bar0', offset=0, size=3)\n"  # line 12
    )
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--no-incremental",
        "--config-file",
        "pyproject.toml",
        str(program),
    ]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    errors = [line.split(":")[1] for line in checked.stdout.splitlines() if ": error:" in line]
    assert errors == ["9", "10", "11", "12"], checked.stdout + checked.stderr
