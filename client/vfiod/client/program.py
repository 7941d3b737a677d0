"""The ``vfiod`` program: finds the subcommand, and imports nothing else."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import Final

__all__ = ["SUBCOMMANDS", "main"]

SUBCOMMANDS: Final = {
    "serve": ("vfiod.client.serve", "run a device server for one VM"),
    "keeper": ("vfiod.client.keeper", "run a device server, and hold its fds over a crash"),
    "run": ("vfiod.client.run", "run a hypervisor with devices that a vfiod of its own holds"),
    "demo": ("vfiod.client.demo", "every part at work on a built-in mediated device, with no hardware"),
    "call": ("vfiod.client.call", "run one command on a server"),
    "monitor": ("vfiod.client.monitor.program", "talk to a server: history, completion, events as they come"),
    "watch": ("vfiod.client.watch.program", "devices, interrupts, DMA maps, exports and events of servers, live"),
    "mdev": ("vfiod.client.mdev", "serve a mediated device to a hypervisor by vfio-user, with no monitor"),
    "host": ("vfiod.client.host.program", "this host's devices and groups: list, bind, unbind, recover"),
    "completion": ("vfiod.client.completion", "what bash, zsh and fish need to complete these command lines"),
}


def usage() -> str:
    """What ``vfiod --help`` prints."""
    lines = [f"  {name:<10} {about}" for name, (_, about) in SUBCOMMANDS.items()]
    return "\n".join(
        [
            "usage: vfiod COMMAND ...",
            "",
            "A device server for virtual machines: holds VFIO devices beside the hypervisor and serves them.",
            "",
            *lines,
            "",
            "'vfiod COMMAND --help' tells more; 'vfiod demo' shows what it does.",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand.

    Returns:
        0: done; 1: it failed, and standard error says why; 2: the command line makes no sense; 130: interrupted.

    """
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] == "help":  # "help COMMAND" is "COMMAND --help"
        argv = [*argv[1:2], "--help"]
    if not argv or argv[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        from importlib.metadata import PackageNotFoundError, version  # slow, and seldom needed

        try:
            print("vfiod", version("vfiod"))
        except PackageNotFoundError:
            print("vfiod (from a source tree)")
        return 0
    if argv[0] not in SUBCOMMANDS:
        from vfiod.client.near import did_you_mean

        print(
            f"vfiod: there is no command '{argv[0]}'{did_you_mean(argv[0], SUBCOMMANDS)}\n\n{usage()}", file=sys.stderr
        )
        return 2
    try:
        module = importlib.import_module(SUBCOMMANDS[argv[0]][0])
        status: int = module.main(argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader has gone (`vfiod ... | head`). Python would complain when it flushes at its own end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return status


if __name__ == "__main__":
    sys.exit(main())
