"""Channel programs on the real vfio-ccw, to a C program that makes the same system calls.

Only inside the lab's s390x machine: ``python -m tests.lab run ccw -- 'python -m tests.bench --only subchannel'``.
There is no compiler there: the lab's host compiles ``subchannel.c`` with Debian's cross compiler
(``gcc-s390x-linux-gnu``), when it has one, and puts it beside this file.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.bench.measuring import Line, paired, per_call
from tests.bench.processes import vfiod
from tests.lab.guest import ccw
from tests.lab.guest.subchannel import LOW, LOW_SIZE, opened
from tests.lab.topologies import CCW_DISK, CCW_TERMINAL

from vfiod.protocol.channel import ChannelProgram
from vfiod.protocol.fd import FileDescriptor
from vfiod.protocol.vfio.ccw import CcwIrq

__all__ = ["available", "lines"]

PROGRAM = Path(__file__).with_name("subchannel")
IOVA, SIZE = 0x10_0000, 0x1_0000


def available() -> bool:
    """Whether this is the lab's s390x machine."""
    return sys.byteorder == "big" and os.geteuid() == 0 and ccw.CSS.exists()


def lines(scale: float) -> Iterator[Line]:
    """Everything of this module."""
    rounds, calls = max(3, int(5 * scale)), max(20, int(100 * scale))
    what = "ccw-request of a NOP, round trip, to pwrite, poll, pread in C"
    if not PROGRAM.exists():
        yield Line(what, None, note="left out: the lab's host has no s390x-linux-gnu-gcc")
        return
    name = ccw.mediated(CCW_TERMINAL)  # a NOP is done by the channel subsystem: every device is the same
    peer = subprocess.Popen(
        [str(PROGRAM), str(ccw.group_of(name)), name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert peer.stdin is not None
    assert peer.stdout is not None
    assert peer.stdout.readline() == "ready\n"

    def in_c() -> float:
        assert peer.stdin is not None
        assert peer.stdout is not None
        peer.stdin.write(f"{calls}\n")
        peer.stdin.flush()
        return float(peer.stdout.readline())

    yield from _direct(in_c, rounds, calls)
    with vfiod() as process:
        wire = process.connect()
        request = _add(wire)
        small = b'{"execute":"query-name"}'

        def ours() -> float:
            return per_call(lambda: wire.call(request), calls)

        def trivial() -> float:
            return per_call(lambda: wire.call(small), calls)

        answer = json.loads(wire.call(request))
        assert answer["return"]["condition-code"] == 0, answer
        found = paired({"ours": ours, "c": in_c, "trivial": trivial}, rounds)
        per_second = f"{1e9 / found.median('ours'):.0f}/s; C: {1e9 / found.median('c'):.0f}/s"
        yield Line(what, found.ratio("ours", "c"), note=per_second)
        yield Line("the same, to a trivial command", found.ratio("ours", "trivial"))
        wire.socket.close()
    peer.stdin.close()
    peer.wait()
    peer.stdout.close()


def _add(wire: object) -> bytes:
    """Give the server memory with a NOP in it, and the disk; the request that runs the NOP."""
    from tests.bench.processes import Wire

    assert isinstance(wire, Wire)
    built = ChannelProgram(IOVA, SIZE)
    built.nop()
    laid = built.build()
    ram = os.memfd_create("guest", os.MFD_CLOEXEC)
    os.ftruncate(ram, SIZE)
    for address, data in laid.pieces:
        os.pwrite(ram, data, address - IOVA)
    wire.command("getfd", ram, fdname="ram")
    os.close(ram)
    wire.command("dma-map", iova=IOVA, size=SIZE, fd="ram")
    name = ccw.mediated(CCW_DISK)
    for fdname, path in (("group", f"/dev/vfio/{ccw.group_of(name)}"), ("container", "/dev/vfio/vfio")):
        with FileDescriptor(os.open(path, os.O_RDWR | os.O_CLOEXEC)) as fd:
            wire.command("getfd", fd.number, fdname=fdname)
    wire.command(
        "device_add",
        driver="vfio-ccw",
        id="d",
        sysfsdev=str(ccw.MDEV / name),
        group_fd="group",
        container_fd="container",
    )
    orb = base64.b64encode(laid.orb.pack()).decode()
    return json.dumps({"execute": "ccw-request", "arguments": {"device": "d", "orb": orb}}).encode()


def _direct(in_c: object, rounds: int, calls: int) -> Iterator[Line]:
    """The same system calls, made by Python itself: what an interpreter costs, without a server."""
    assert callable(in_c)
    with opened(CCW_DISK, "group") as device:
        built = ChannelProgram(LOW, LOW_SIZE)
        built.nop()
        orb = device.lay(built.build())

        def one() -> None:
            assert device.start(orb) == 0
            device.wait(CcwIrq.IO)
            device.io()

        found = paired({"python": lambda: per_call(one, calls), "c": in_c}, rounds)
        yield Line("pwrite, poll, pread in Python, to the same in C", found.ratio("python", "c"))
