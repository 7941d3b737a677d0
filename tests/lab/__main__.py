"""``python -m tests.lab``: the lab by hand. ``list``, ``run TOPOLOGY -- COMMAND``, ``shell TOPOLOGY``."""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.lab import launch, vng
from tests.lab.places import GUEST_EXCHANGE, GuestDiedError
from tests.lab.topologies import TOPOLOGIES, Topology


def main() -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.lab", description="Boot a lab machine by hand.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the machines there are")
    run = commands.add_parser("run", help="run one command as root in a machine, print its output")
    run.add_argument("topology", choices=TOPOLOGIES)
    run.add_argument("words", nargs="+", metavar="COMMAND", help="after --; one word is a shell line")
    shell = commands.add_parser("shell", help="an interactive shell in a machine; needs a terminal")
    shell.add_argument("topology", choices=TOPOLOGIES)
    arguments = parser.parse_args()
    if arguments.command == "list":
        for topology in TOPOLOGIES.values():
            print(f"{topology.name:12} {topology.about}")
        return 0
    topology = TOPOLOGIES[arguments.topology]
    reason = launch.unavailable_reason(topology)
    if reason is None and arguments.command == "shell" and topology.relayed:
        reason = f"{topology.name} has no shell for a terminal; use run"
    if reason is not None:
        print(f"lab: {reason}", file=sys.stderr)
        return 1
    if arguments.command == "run":
        words = arguments.words
        return run_command(topology, words[0] if len(words) == 1 else shlex.join(words))
    return run_shell(topology)


def run_command(topology: Topology, command: str) -> int:
    """Run ``command`` in a new guest, pass its output on as it comes, and return its status."""
    with launch.Guest(topology, command) as guest:
        print(f"lab: {topology.name} boots; QEMU's monitor is {guest.qmp_path}", file=sys.stderr)
        shown = 0
        try:
            going = True
            while going:
                going = guest.check()
                text = guest.output()
                sys.stdout.write(text[shown:])
                sys.stdout.flush()
                shown = len(text)
                time.sleep(0.1)
        except GuestDiedError as error:
            print(f"lab: {error}", file=sys.stderr)
            return 1
        status = guest.status
        return 1 if status is None else status


def run_shell(topology: Topology) -> int:
    """Give this terminal to a root shell in a new guest; it ends with the shell."""
    directory = Path(tempfile.mkdtemp(prefix="vfiod-lab-"))
    try:
        exchange = directory / "exchange"
        exchange.mkdir()
        inner = directory / "exchange" / "shell"
        launch.write_start_script(exchange, "true", {}, launch.TOTAL_SECONDS, vng.prepare(topology, directory))
        start = (exchange / "start").read_text()
        # The same preparation as for a command, then a shell instead of it, on the terminal.
        lines = [line for line in start.splitlines() if not line.startswith(("exec ", "timeout ", "echo ", "mv "))]
        inner.write_text("\n".join([*lines, "exec /bin/bash -i"]) + "\n")
        inner.chmod(0o755)
        print(f"lab: {topology.name} boots; QEMU's monitor is {directory / 'qmp'}; `exit` ends it", file=sys.stderr)
        line = vng.vng_command(topology, directory, ["--shell", f"{GUEST_EXCHANGE}/shell"])
        line.remove("--verbose")
        return subprocess.run(line, env=vng.environment(directory), check=False).returncode
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
