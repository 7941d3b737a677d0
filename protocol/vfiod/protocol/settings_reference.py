"""What is written from the settings: ``docs/configuration.md`` and the JSON schema of the file.

``python -m vfiod.protocol.settings_reference markdown|schema``
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from vfiod.protocol.settings import SERVE, Setting

__all__ = ["markdown", "schema"]

_INTRODUCTION = """\
# Configuration

Written from the settings (`protocol/vfiod/protocol/settings.py`) by `make docs`: do not edit.

`vfiod serve` takes its options from the command line, and with `--config FILE` from a TOML file. A key of the file is an option without
its dashes; an option on the command line wins, and replaces a list whole. All keys stand at the top: there are no sections.

The file is checked before anything begins, and all that is wrong is said at once, with exit status 2:

```toml file=wrong.toml
name = "vm1"
qmp = "unix:qmp"
alow_open = true
log-level = "loud"
```

```console
$ vfiod serve --config wrong.toml || echo "status $?"
vfiod: wrong.toml:3: unknown key 'alow_open': did you mean 'allow-open'?
vfiod: wrong.toml:4: 'log-level' expects one of debug, info, warning, error, got 'loud'
status 2
```

Editors check it as you type with [`vfiod.schema.json`](vfiod.schema.json) (JSON Schema): put `#:schema .../vfiod.schema.json` in the first
line (Taplo, Even Better TOML). SIGHUP reads the file again: `log-level` and `trace` are taken, of the rest the log says that it waits for
a restart; a file with an error changes nothing. In the sandbox it must be the same file: write into it, do not put another in its place.

```toml run-by=tests/unit/protocol/test_settings.py::test_the_page_s_own_example_is_right
name = "vm1"
qmp = ["unix:/run/vfiod/vm1/qmp", "unix:/run/vfiod/vm1/look,role=observer"]
metrics = "unix:/run/vfiod/vm1/metrics"
log-level = "info"
allow-uid = [107]
```

| key and option | value | default | |
|---|---|---|---|"""  # noqa: E501 - as wide as the other pages

_WORDS = {str: "text", int: "integer", bool: "`true`, `false`"}
_JSON = {str: "string", int: "integer", bool: "boolean"}


def markdown() -> str:
    """The page, ending in one newline."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield _INTRODUCTION
    for one in SERVE:
        if not one.in_file:
            continue
        value = " or ".join(f"`{choice}`" for choice in one.choices) or one.expects or _type(one)
        if one.many:
            value += "; or a list"
        told = one.help.replace("; may be repeated", "") + (f". {one.more}" if one.more else "")
        example = f" Example: `{one.example}`" if one.example and not one.flag else ""
        cells = [f"`{one.name}`", value, f"`{one.standard}`" if one.standard else "", f"{told.rstrip('.')}.{example}"]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _type(setting: Setting) -> str:
    return " or ".join(_WORDS[one] for one in setting.types)


def schema() -> dict[str, Any]:
    """The file's JSON Schema (draft 2020-12)."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "The configuration of vfiod serve",
        "type": "object",
        "additionalProperties": False,
        "properties": {one.name: _property(one) for one in SERVE if one.in_file},
    }


def _property(setting: Setting) -> dict[str, Any]:
    kinds = [_kind(setting, one) for one in setting.types]
    if setting.many:
        kinds.append({"type": "array", "items": kinds[0] if len(kinds) == 1 else {"anyOf": kinds}})
    described = {"description": f"{setting.help}. {setting.more}".strip().rstrip(".") + "."}
    if setting.standard:
        described["default"] = setting.standard
    return described | (kinds[0] if len(kinds) == 1 else {"anyOf": kinds})


def _kind(setting: Setting, kind: type) -> dict[str, Any]:
    made: dict[str, Any] = {"type": _JSON[kind]}
    if kind is int:
        made |= {"minimum": setting.least, "maximum": setting.most}
    if kind is str:
        if setting.choices:
            made["enum"] = list(setting.choices)
        if setting.pattern:
            # Where Python needs "(?!\n)" behind "$", ECMA 262 means the end anyway, and takes it as it is.
            made["pattern"] = setting.pattern
        if setting.most and int not in setting.types:
            made["maxLength"] = setting.most
    return made


if __name__ == "__main__":
    if sys.argv[1:] == ["schema"]:
        print(json.dumps(schema(), indent=2))
    else:
        sys.stdout.write(markdown())
