"""A real server, and terminals at it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from vfiod.client import Client
from vfiod.client.spawn import OwnServer, own_server

from .screen import Screen

PICTURES: Final = Path(__file__).parents[3] / "docs/pictures"
NEW_PICTURES: Final = bool(os.environ.get("VFIOD_PICTURES"))
"""``VFIOD_PICTURES=1 pytest tests/integration/terminal`` draws the pictures of the documentation anew."""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[OwnServer]:
    with own_server(tmp_path, name="vm1") as running:
        yield running
        assert running.stop() == 0, running.messages()
    assert "Traceback" not in running.messages(), running.messages()


@pytest.fixture
def device(server: OwnServer) -> str:
    with Client.connect(server.path, timeout=60) as client:
        uuid = client.mdev_create(parent="primer", type="primer-pci").uuid
        client.device_add(driver="vfio-pci", id="nic0", mdev=uuid)
    return "nic0"


@pytest.fixture
def terminal(server: OwnServer, home: Path) -> Iterator[Callable[..., Screen]]:
    """Opens terminals, and closes them."""
    opened: list[Screen] = []

    def make(*arguments: object, **more: Any) -> Screen:
        opened.append(Screen(*arguments, home=home, **more))
        return opened[-1]

    yield make
    for screen in opened:
        screen.child.close(force=True)


@pytest.fixture
def picture() -> Callable[[Screen, str, str, tuple[str, ...]], None]:
    """Checks a picture of the documentation against the screen: the same key contents are in both."""

    def check(screen: Screen, name: str, title: str, contents: tuple[str, ...]) -> None:
        screen.see(*contents)
        path = PICTURES / f"{name}.svg"
        if NEW_PICTURES:
            path.parent.mkdir(exist_ok=True)
            nobodys = r' textLength="[0-9.]+">([^<]*)/tmp/[^<]*'  # a path of this machine
            path.write_text(re.sub(nobodys, r">\1/run/vfiod/nic0.sock", screen.svg(title)))
        drawn = path.read_text()
        assert f"<title>{title}</title>" in drawn
        missing = [word for part in contents for word in part.split() if word not in drawn]
        assert not missing, f"{path.name} does not show {missing}: draw it anew (VFIOD_PICTURES=1)"

    return check
