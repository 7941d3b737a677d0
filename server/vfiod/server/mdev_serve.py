"""``vfiod mdev serve``: one mediated device as a vfio-user program of its own, with no monitor.

The options and manners are those of the specification, "Backend program conventions": it stays in the foreground, ends
on SIGTERM, and takes its socket by ``--socket-path`` or ``--fd``, never both. It is a machine with one device and one
export, nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import re
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any, Final

from vfiod.protocol.catalogue.devices import Driver
from vfiod.protocol.errors import InvalidArgument, VfiodError
from vfiod.protocol.fd import FileDescriptor
from vfiod.protocol.settings import ALLOW_PATH, mdev_serve_parser
from vfiod.server.events import EventHub
from vfiod.server.exports import NewExport, exports_of
from vfiod.server.kernel import signalling
from vfiod.server.loop import new_loop
from vfiod.server.machine import Machine, NewDevice
from vfiod.server.notify import Notifier
from vfiod.server.options import OptionError
from vfiod.server.program import ENDING_SIGNALS, raise_open_files, refuse_overflow_uid
from vfiod.server.sandbox.entry import Wanted, confine, restrict

__all__ = ["main"]

_log: Final = logging.getLogger("vfiod")

NAME: Final = "device"
"""What the device and its export are called in the log."""


def main(arguments: Sequence[str]) -> int:
    """Serve until asked to end.

    Returns 0: it ended as asked; 1: it could not begin, or something could not be closed. SystemExit 2: wrong options.
    """
    options = mdev_serve_parser().parse_args(arguments)
    logging.basicConfig(
        level=options.log_level.upper(), format="%(name)s %(levelname).1s %(message)s", stream=sys.stderr
    )
    try:
        refuse_overflow_uid()
        raise_open_files()
        signalling.interruptible()
        with asyncio.Runner(loop_factory=new_loop) as runner:
            clean = runner.run(_serve(options))
    except VfiodError as error:
        print(f"vfiod mdev serve: {error}", file=sys.stderr)
        return 1
    return 0 if clean else 1


async def _serve(options: argparse.Namespace) -> bool:
    loop = asyncio.get_running_loop()
    hub = EventHub(loop.call_later)
    machine = Machine(options.type, hub=hub, allow_uid=frozenset(options.allow_uid))
    ending = asyncio.Event()
    for number in ENDING_SIGNALS:
        loop.add_signal_handler(number, ending.set)

    door: NewExport | None = None
    notifier = Notifier()
    try:
        door = _door(options)
        wanted = _sandbox(options)
        # Before the parent is imported: it gets what the options name, and no more.
        confine(wanted)
        restrict(wanted)
        device = await _device(machine, options)
        exports = exports_of(machine)
        exports.on_gone = ending.set  # of a socket that came connected: its one client is gone
        taken, door = door, None
        exports.add(taken, device)
        gc.freeze()
        gc.enable()
        notifier.tell(f"READY=1\nSTATUS=Serving {options.type}")
        _log.info("Serving %s", options.type)
        await ending.wait()
    finally:
        notifier.tell("STOPPING=1")
        if door is not None:
            door.close()
        problems = await machine.close()
        for number in ENDING_SIGNALS:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)
        notifier.close()
    for problem in problems:
        _log.error("%s", problem)
    return not problems


def _sandbox(options: argparse.Namespace) -> Wanted:
    """What the program keeps: its socket's directory, and the paths that its command line names."""
    for path in options.allow_path:
        if wrong := ALLOW_PATH.wrong(path):
            raise OptionError(f"--allow-path {wrong}")
    named = [value for _, value in map(_parameter, options.parameter) if isinstance(value, str)]
    made = [value.partition(":")[2] for value in named if re.match(r"[a-z]+:/", value)]  # "socket:PATH", "pty:LINK"
    own = [] if options.socket_path is None else [options.socket_path]
    return Wanted(
        mode=options.sandbox,
        sockets=(*own, *made),
        sockets_to_come=bool(made),
        paths=(*options.allow_path, *(value for value in named if value.startswith("/"))),
    )


def _door(options: argparse.Namespace) -> NewExport:
    if options.socket_path is not None:
        return NewExport.at(NAME, options.socket_path)
    try:
        inherited = socket.socket(fileno=options.fd)
    except OSError as error:
        raise InvalidArgument(f"--fd {options.fd} is no inherited socket: {error.strerror}") from error
    inherited.set_inheritable(False)
    return NewExport.of(NAME, FileDescriptor(inherited.detach()))


async def _device(machine: Machine, options: argparse.Namespace) -> Any:
    """Make the device, and add it. VfiodError."""
    parent, mdev_type = await machine.mdevs.find_type(options.type)
    parameters = dict(_parameter(text) for text in options.parameter)
    uuid = await machine.mdevs.create(parent, mdev_type.id, None, parameters or None)
    driver = Driver(mdev_type.device_api)
    new = NewDevice(
        id=NAME,
        driver=driver,
        backend_kind="mdev",
        host=uuid,
        options=_options(driver, share_fd=options.share_fd == "on"),
        open=lambda user: machine.sources.mediated.open(uuid, user, driver),
        discard=lambda: None,
    )
    return await machine.add_device(new)


def _options(driver: Driver, *, share_fd: bool) -> Any:
    from vfiod.server.devices.model import Options
    from vfiod.server.devices.pci import PciOptions

    return PciOptions(share_fd=share_fd) if driver is Driver.VFIO_PCI else Options(share_fd=share_fd)


def _parameter(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise InvalidArgument(f"--parameter expects KEY=VALUE, got '{text}'")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value
