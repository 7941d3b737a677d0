"""docs/commands.md: every command has an example, and every example is what a real server answers."""

from __future__ import annotations

from pathlib import Path

from tests.integration.pages.conversation import converse

from vfiod.client.spawn import own_server
from vfiod.protocol.catalogue import COMMANDS
from vfiod.protocol.examples import STORIES, of_command

UUID = "0b0c6d7e-9a44-4d8e-8a44-1b3c7c1d2e99"
PLACE = "/run/vfiod/vm1"


def test_every_command_has_an_example() -> None:
    examples = {name: of_command(name) for name in COMMANDS}
    assert [name for name, found in examples.items() if not found] == []
    refused = [name for name, found in examples.items() if all(example.refused for example in found)]
    assert refused == []


def test_every_example(tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(64 * 512))
    with own_server(tmp_path, ["--uuid", UUID, "--allow-path", str(tmp_path)], name="vm1") as server:
        for name, story in STORIES.items():
            converse(server.path, story.replace(PLACE, str(tmp_path)), name)
        assert server.wait(120) == 0
        assert "Traceback" not in server.messages()
