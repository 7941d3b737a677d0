"""Every command line of ``vfiod`` as argparse has it: what completion and the manual pages are written from."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator
from typing import Final

from vfiod.client.program import SUBCOMMANDS
from vfiod.protocol.settings import MDEV_SERVE, SERVE, mdev_serve_parser, serve_parser

__all__ = ["Option", "Program", "options_of", "programs"]

FILES: Final = frozenset({"path", "paths"})
"""Positional arguments that are files: sockets of monitors."""

Option = argparse.Action
"""One option or positional argument."""


class Program:
    """One command line: of a subcommand, or of a verb of it.

    Args:
        words: how it is called, ``("host", "bind")``.
        about: one line.
        parser: its options.
        last: whether it has no verbs.

    """

    def __init__(self, words: tuple[str, ...], about: str, parser: argparse.ArgumentParser, *, last: bool) -> None:
        self.words: Final = words
        self.about: Final = about
        self.parser: Final = parser
        self.last: Final = last

    @property
    def offers(self) -> dict[str, str]:
        """What a shell completes for an option's value, by the option: ``file`` or ``directory``."""
        declared = {("serve",): SERVE, ("mdev", "serve"): MDEV_SERVE}.get(self.words, ())
        return {f"--{one.name}": one.offers for one in declared if one.offers}


def _parser(name: str) -> argparse.ArgumentParser:
    if name == "serve":
        return serve_parser()
    if name == "mdev":
        made = argparse.ArgumentParser("vfiod mdev", description="Mediated devices as programs of their own.")
        inner = made.add_subparsers(metavar="serve", required=True)
        serve = mdev_serve_parser()
        inner.add_parser(
            "serve", parents=[serve], add_help=False, help=serve.description, description=serve.description
        )
        return made
    module = importlib.import_module(SUBCOMMANDS[name][0])
    parser: argparse.ArgumentParser = module.parser()
    return parser


def programs() -> Iterator[Program]:
    """All of them, a subcommand before its verbs."""
    for name, (_, about) in SUBCOMMANDS.items():
        yield from _with_verbs((name,), about, _parser(name))


def _with_verbs(words: tuple[str, ...], about: str, parser: argparse.ArgumentParser) -> Iterator[Program]:
    verbs = next((one for one in parser._actions if isinstance(one, argparse._SubParsersAction)), None)
    yield Program(words, about, parser, last=verbs is None)
    if verbs is not None:
        told = {one.dest: one.help or "" for one in verbs._choices_actions}
        for verb, inner in verbs.choices.items():
            yield from _with_verbs((*words, verb), told.get(verb, ""), inner)


def options_of(program: Program) -> tuple[list[Option], list[Option]]:
    """Its options, and its positional arguments."""
    actions = [one for one in program.parser._actions if not isinstance(one, argparse._SubParsersAction)]
    return [one for one in actions if one.option_strings], [one for one in actions if not one.option_strings]
