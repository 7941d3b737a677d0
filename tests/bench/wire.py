"""The wire alone, no sockets: what splitting and decoding cost beside one bare msgspec decode, and how that grows.

``python -m tests.bench.wire`` prints nanoseconds as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from time import perf_counter_ns

import msgspec
from tests.bench.measuring import Line, paired

from vfiod.protocol.catalogue import COMMANDS
from vfiod.protocol.catalogue.regions import RegionReadResult
from vfiod.protocol.wire import jsonrpc, qmp
from vfiod.protocol.wire.arguments import decode_arguments
from vfiod.protocol.wire.stream import JsonStream

SMALL = b'{"execute":"query-version","id":1}'
USUAL = b'{"execute":"region-read","arguments":{"device":"edu0","region":"bar0","offset":4,"size":4},"id":12}'
USUAL_RPC = (
    b'{"jsonrpc":"2.0","method":"region-read","params":{"device":"edu0","region":"bar0","offset":4,"size":4},"id":12}'
)
LARGE = b'{"execute":"region-write","arguments":{"data":"' + b"A" * (1 << 20) + b'"}}'
CHUNK = 4096


def feed(data: bytes, chunk: int) -> None:
    stream = JsonStream()
    for position in range(0, len(data), chunk):
        stream.receive_data(data[position : position + chunk])


def contestants() -> dict[str, tuple[Callable[[], object], int]]:
    """Each with the number of messages one call handles."""
    stream, bare = JsonStream(), msgspec.json.Decoder(qmp.Request).decode
    spec = COMMANDS["region-read"]

    def whole_path() -> None:
        for text in stream.receive_data(USUAL):
            request = qmp.decode_request(text, oob_enabled=True)
            assert isinstance(request, qmp.Request)
            decode_arguments(spec, request.arguments)
            qmp.encode_return(RegionReadResult(value=5), request.id)

    lines, joined = (USUAL + b"\n") * 1000, USUAL * 1000
    return {
        "bare msgspec decode, small": (lambda: bare(SMALL), 1),
        "bare msgspec decode, usual": (lambda: bare(USUAL), 1),
        "split, small": (lambda: stream.receive_data(SMALL), 1),
        "split, usual": (lambda: stream.receive_data(USUAL), 1),
        "split, 1000 usual ones in lines": (lambda: stream.receive_data(lines), 1000),
        "split, 1000 usual ones without line ends": (lambda: stream.receive_data(joined), 1000),
        "split, 4000 usual ones without line ends": (lambda: stream.receive_data(joined * 4), 4000),
        "split, 1 MiB at once": (lambda: feed(LARGE, len(LARGE)), 1),
        "split, 1 MiB in pieces of 4 KiB": (lambda: feed(LARGE, CHUNK), 1),
        "split, 4 MiB in pieces of 4 KiB": (lambda: feed(LARGE[:-3] + b"A" * (3 << 20) + LARGE[-3:], CHUNK), 1),
        "QMP request, small": (lambda: qmp.decode_request(SMALL, oob_enabled=True), 1),
        "QMP request, usual": (lambda: qmp.decode_request(USUAL, oob_enabled=True), 1),
        "JSON-RPC request, usual": (lambda: jsonrpc.decode_request(USUAL_RPC), 1),
        "split, decode, check arguments, encode the reply": (whole_path, 1),
    }


def measure(scale: float) -> dict[str, list[float]]:
    """Nanoseconds per message, one value per round."""

    def timed(call: Callable[[], object], messages: int) -> Callable[[], float]:
        start = perf_counter_ns()
        call()
        calls = max(1, int(scale * 2_000_000 / max(perf_counter_ns() - start, 100)))

        def per_message() -> float:
            start = perf_counter_ns()
            for _ in range(calls):
                call()
            return (perf_counter_ns() - start) / calls / messages

        return per_message

    return dict(paired({name: timed(*what) for name, what in contestants().items()}, rounds=15).values)


def lines(scale: float) -> Iterator[Line]:
    """Ratios, for the table of ``python -m tests.bench``. No budget: the round trip has one."""
    values = measure(scale)

    def ratio(one: str, other: str) -> float:
        return sorted(a / b for a, b in zip(values[one], values[other], strict=True))[len(values[one]) // 2]

    bare = "bare msgspec decode, usual"
    for what in ("split, usual", "QMP request, usual", "JSON-RPC request, usual"):
        yield Line(f"wire: {what}, to a bare msgspec decode", ratio(what, bare))
    many, more = "split, 1000 usual ones without line ends", "split, 4000 usual ones without line ends"
    yield Line("wire: one of 1000 pipelined in lines, to a bare decode", ratio("split, 1000 usual ones in lines", bare))
    yield Line("wire: one of 1000 pipelined without line ends, to a bare decode", ratio(many, bare))
    yield Line("wire: one of 4000 pipelined, to one of 1000 (1: linear)", ratio(more, many))
    big, bigger = "split, 1 MiB in pieces of 4 KiB", "split, 4 MiB in pieces of 4 KiB"
    yield Line("wire: 4 MiB in pieces of 4 KiB, to 1 MiB (4: linear)", ratio(bigger, big))


if __name__ == "__main__":
    for name, rounds in measure(1.0).items():
        print(f"{name:<55} {sorted(rounds)[len(rounds) // 2]:>12,.0f} ns per message, best {min(rounds):,.0f}")
    for line in lines(1.0):
        print(f"{line.what:<75} {line.value:.2f}x")
