"""The settings: one declaration, of which the page, the schema and the examples are true."""

from __future__ import annotations

import importlib
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from vfiod.protocol.settings import SERVE, serve_parser
from vfiod.protocol.settings_reference import markdown, schema
from vfiod.server.configuration import ConfigurationError, read

DOCS = Path(__file__).parents[3] / "docs"


def test_the_page_and_the_schema_are_current() -> None:
    assert (DOCS / "configuration.md").read_text() == markdown(), "run `make docs`"
    assert json.loads((DOCS / "vfiod.schema.json").read_text()) == schema(), "run `make docs`"


def test_every_option_has_its_key() -> None:
    options = {name[2:] for action in serve_parser()._actions for name in action.option_strings if name[:2] == "--"}
    assert options - {"help", "config", "take-over", "daemonize"} == set(schema()["properties"])
    assert len({one.name for one in SERVE}) == len(SERVE)


def test_the_page_s_own_example_is_right(tmp_path: Path) -> None:
    file = tmp_path / "vm.toml"
    page = (DOCS / "configuration.md").read_text()
    file.write_text(page.partition("```toml run-by=")[2].partition("\n")[2].partition("```")[0])
    assert read(str(file))[0]["name"] == "vm1"


GOOD = [f"{one.name} = {one.example}" for one in SERVE if one.example]
SAMPLES = [
    *GOOD, "", "name = 'é'", "name = ''",
    f"name = '{'x' * 255}'", f"name = '{'x' * 256}'", 'name = "a\\nb"', "name = 1",
    "uuid = '42'", "uuid = 1979-05-27", "qmp = 'unix:/a'", "qmp = 'fd=3,role=observer'", "qmp = 'fd=x'", "qmp = []",
    "qmp = ['tcp:1']", "qmp = [1]", "qmp = [['unix:/a']]", "allow-open = 1", "allow-open = false", "allow-uid = 0",
    "allow-uid = -1", "allow-uid = true", "allow-uid = 4294967294", "allow-uid = 4294967295", "allow-uid = [1, '1']",
    "allow-uid = 1.5", "socket-group = 1", "socket-group = -1", "socket-group = []", "log-level = 'loud'",
    "log-format = 'xml'", "role = 'a='", "role = 'A=x'", "role = 'a=x,,y'", "metrics = 'tcp'", "metrics = '::1:1'",
    "bus = 'ipc:'", "bus = 'udp:x:1'", "sandbox = 'maybe'", "sandbox = true", "allow-path = 'relative'",
    "allow-path = ['ro:/x', '/y']", "nmae = 'x'", "[server]\nname = 'x'", "name.x = 1", "config = 'x'",
]  # fmt: skip


@pytest.mark.parametrize("text", SAMPLES)
def test_the_schema_and_the_server_judge_alike(text: str, tmp_path: Path) -> None:
    jsonschema: Any = importlib.import_module("jsonschema")  # jsonrpcserver's
    value = json.loads(json.dumps(tomllib.loads(text), default=str))
    file = tmp_path / "vm.toml"
    file.write_text(text)
    try:
        read(str(file))
    except ConfigurationError:
        refused = True
    else:
        refused = False
    validator = jsonschema.Draft202012Validator(schema())
    assert validator.is_valid(value) is not refused
    assert not (refused and text in GOOD)
