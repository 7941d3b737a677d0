"""The catalogue as text for a person at the monitor."""

from __future__ import annotations

import inspect
import itertools

import msgspec

from vfiod.client.line import members, plain_type
from vfiod.client.monitor.complete import LOCAL, about, readable
from vfiod.client.near import meant
from vfiod.protocol.catalogue import COMMANDS, CommandSpec

__all__ = ["help_text"]


def help_text(command: str = "") -> str:
    """All commands by family, or one with its arguments."""
    if command in LOCAL:
        return f"{command}: {LOCAL[command]} (the monitor's own)"
    if command:
        spec = COMMANDS.get(command)
        return _one(spec) if spec else f"There is no command '{command}'{meant(command, more=LOCAL)}"
    lines = []
    ordered = sorted(COMMANDS.values(), key=lambda spec: spec.family)
    for family, specs in itertools.groupby(ordered, key=lambda spec: spec.family):
        lines.append(f"\n{family.value}")
        lines += [f"  {spec.name:<24} {readable(spec.summary)}" for spec in specs]
    lines.append("\nthe monitor's own")
    lines += [f"  {name:<24} {text}" for name, text in LOCAL.items()]
    lines.append("\n'help COMMAND' tells more. A line is: COMMAND key=value ..., or JSON as QMP has it.")
    return "\n".join(lines).lstrip("\n")


def _one(spec: CommandSpec) -> str:
    lines = [spec.name, "", *("  " + line for line in readable(inspect.getdoc(spec.arguments) or "").splitlines()), ""]
    required = {
        field.encode_name for field in msgspec.structs.fields(spec.arguments) if field.required
    }  # fmt: skip
    for name, hint in members(spec.arguments).items():
        kind = getattr(plain_type(hint), "__name__", None) or str(plain_type(hint)).replace("typing.", "")
        told = about(hint)
        lines.append(f"  {name}{'' if name in required else ' (optional)'}: {kind}{'. ' + told if told else ''}")
    if spec.allow_oob:
        lines.append('\n  May run out of band: {"exec-oob": "' + spec.name + '"}')
    return "\n".join(lines)
