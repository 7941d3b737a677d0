"""The 16550A by the data sheet's tables: each row is what is done, and what must be seen after."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiod.server.mdev.samples.uart import FIFO_SIZE, Uart

RBR, THR, IER, IIR, FCR, LCR, MCR, LSR, MSR, SCR = 0, 0, 1, 2, 2, 3, 4, 5, 6, 7

W, R, RX, TX, CONNECT = "write", "read", "receive", "sent", "connect"

Step = tuple[str, int] | tuple[str, int, int] | tuple[str, bytes] | tuple[str, bool]

IDLE = (R, IIR, 0x01)
FIFOS = (W, FCR, 0x01)

CASES: dict[str, list[Step]] = {
    "after reset": [(R, IER, 0), IDLE, (R, LCR, 0), (R, MCR, 0), (R, LSR, 0x60), (R, MSR, 0)],
    "scratch": [(W, SCR, 0xA5), (R, SCR, 0xA5)],
    "divisor behind DLAB": [(W, LCR, 0x83), (W, 0, 0x01), (W, 1, 0x02), (R, 0, 1), (R, 1, 2), (W, LCR, 3), (R, IER, 0)],
    "IER has four bits": [(W, IER, 0xFF), (R, IER, 0x0F)],
    "MCR has five bits": [(W, MCR, 0xFF), (R, MCR, 0x1F)],
    "LSR and MSR take nothing": [(W, LSR, 0xFF), (R, LSR, 0x60), (W, MSR, 0xFF), (R, MSR, 0)],
    "IIR shows that FIFOs are on": [FIFOS, (R, IIR, 0xC1), (W, FCR, 0), IDLE],
    "data ready": [(RX, b"a"), (R, LSR, 0x61), (R, RBR, 0x61), (R, LSR, 0x60)],
    "an empty receiver reads as 0": [(R, RBR, 0)],
    "received data is the second most urgent": [
        (W, IER, 0x0F), (RX, b"a"), (R, IIR, 0x04), (R, IIR, 0x04), (R, RBR, 0x61),
    ],
    "trigger level 4: time-out below, data from there on": [
        (W, FCR, 0x41), (W, IER, 1), (RX, b"abc"), (R, IIR, 0xCC), (RX, b"d"), (R, IIR, 0xC4), (R, RBR, 0x61),
        (R, IIR, 0xCC),
    ],
    "trigger level 14": [(W, FCR, 0xC1), (W, IER, 1), (RX, b"x" * 13), (R, IIR, 0xCC), (RX, b"y"), (R, IIR, 0xC4)],
    "no interrupt unless enabled": [(RX, b"a"), IDLE, (W, IER, 1), (R, IIR, 0x04)],
    "THRE fires when it is enabled": [(W, IER, 2), (R, IIR, 0x02), IDLE],
    "THRE fires again when it is enabled again": [
        (W, IER, 2), (R, IIR, 0x02), (W, IER, 0), (W, IER, 2), (R, IIR, 0x02),
    ],
    "THRE waits until the line took all": [
        FIFOS, (W, IER, 2), (R, IIR, 0xC2), (W, THR, 0x41), (W, THR, 0x42), (R, IIR, 0xC1), (R, LSR, 0),
        (TX, 1), (R, IIR, 0xC1), (TX, 1), (R, LSR, 0x60), (R, IIR, 0xC2),
    ],
    "writing THR takes THRE back": [(W, IER, 2), (W, THR, 0x41), IDLE],
    "IIR does not acknowledge what it does not tell": [
        (W, IER, 3), (RX, b"a"), (R, IIR, 0x04), (R, RBR, 0x61), (R, IIR, 0x02),
    ],
    "overrun without FIFOs: the new one stays": [
        (W, IER, 4), (RX, b"ab"), (R, IIR, 0x06), (R, LSR, 0x63), IDLE, (R, RBR, 0x62),
    ],
    "overrun with FIFOs: the old ones stay": [
        FIFOS, (RX, b"0123456789abcdef!"), (R, LSR, 0x63), (R, RBR, 0x30), (R, LSR, 0x61),
    ],
    "clearing the receiver": [FIFOS, (RX, b"abc"), (W, FCR, 0x03), (R, LSR, 0x60)],
    "clearing the transmitter": [FIFOS, (W, THR, 1), (R, LSR, 0), (W, FCR, 0x05), (R, LSR, 0x60)],
    "changing the FIFOs clears them": [FIFOS, (RX, b"abc"), (W, FCR, 0), (R, LSR, 0x60)],
    "somebody connects": [(W, IER, 8), (CONNECT, True), (R, IIR, 0x00), (R, MSR, 0xBB), (R, MSR, 0xB0), IDLE],
    "and goes": [(CONNECT, True), (R, MSR, 0xBB), (CONNECT, False), (R, MSR, 0x0B), (R, MSR, 0)],
    "loopback: outputs are inputs": [(W, MCR, 0x1A), (R, MSR, 0x99), (W, MCR, 0x15), (R, MSR, 0x6B)],
    "loopback: the end of RI": [(W, MCR, 0x14), (R, MSR, 0x40), (W, MCR, 0x10), (R, MSR, 0x04)],
    "loopback: data comes back": [FIFOS, (W, MCR, 0x10), (W, THR, 0x55), (R, LSR, 0x61), (R, RBR, 0x55)],
    "loopback: the line is not heard": [(W, MCR, 0x10), (RX, b"a"), (R, LSR, 0x60)],
    "loopback: an overrun of its own": [(W, MCR, 0x10), (W, THR, 1), (W, THR, 2), (R, LSR, 0x63)],
    "8250 autoconfig": [  # drivers/tty/serial/8250/8250_port.c, autoconfig and autoconfig_16550a
        (W, IER, 0), (R, IER, 0), (W, IER, 0x0F), (R, IER, 0x0F), (W, IER, 0),
        (W, MCR, 0x1A), (R, MSR, 0x99), (W, MCR, 0),
        (W, LCR, 0xBF), (W, IIR, 0), (W, LCR, 0), (W, FCR, 0x01), (R, IIR, 0xC1),
        (W, LCR, 0x80), (R, 2, 0xC1), (W, LCR, 0), (W, FCR, 0x21), (R, IIR, 0xC1),
    ],
}  # fmt: skip


def do(uart: Uart, step: Step) -> None:
    match step:
        case ("write", int(at), int(value)):
            uart.write(at, value)
        case ("read", int(at), int(value)):
            seen = uart.read(at)
            assert seen == value, f"register {at} is 0x{seen:02x}, not 0x{value:02x}"
        case ("receive", bytes(data)):
            uart.receive(data)
        case ("connect", bool(there)):
            uart.connect(there)
        case ("sent", int(count)):
            uart.sent(count)
        case _:
            raise AssertionError(step)


@pytest.mark.parametrize("steps", CASES.values(), ids=CASES)
def test_by_the_sheet(steps: list[Step]) -> None:
    uart = Uart()
    for number, step in enumerate(steps):
        try:
            do(uart, step)
        except AssertionError as error:
            raise AssertionError(f"step {number}, {step}: {error}") from None


def test_what_it_sends_and_what_it_loses() -> None:
    uart = Uart()
    uart.write(FCR, 1)
    for value in range(20):
        uart.write(THR, value)
    assert uart.outgoing == bytes(range(FIFO_SIZE))
    assert uart.lost == 4
    uart.sent(3)
    assert uart.outgoing == bytes(range(3, FIFO_SIZE))
    uart.reset()
    assert (uart.outgoing, uart.lost) == (b"", 0)


def test_reset_keeps_who_is_connected() -> None:
    uart = Uart()
    uart.connect(True)
    uart.write(IER, 0x0F)
    uart.reset()
    assert uart.read(MSR) == 0xB0, "the lines are up, and nothing changed"
    assert not uart.interrupt


ACTIONS = st.one_of(
    st.tuples(st.just("write"), st.integers(0, 7), st.integers(0, 255)),
    st.tuples(st.just("read"), st.integers(0, 7)),
    st.tuples(st.just("receive"), st.binary(max_size=40)),
    st.tuples(st.just("sent"), st.integers(-1, 20)),
    st.tuples(st.just("connect"), st.booleans()),
    st.tuples(st.just("reset")),
)


@given(st.lists(ACTIONS, max_size=60))
def test_whatever_a_guest_and_a_peer_do(actions: list[tuple[object, ...]]) -> None:
    """Registers are bytes, FIFOs are bounded, and the line is up exactly while IIR has something to say."""
    uart = Uart()
    for action in actions:
        match action:
            case ("write", int(at), int(value)):
                uart.write(at, value)
            case ("read", int(at)):
                before = uart.interrupt
                seen = uart.read(at)
                assert 0 <= seen <= 255
                if at == IIR:
                    assert before == (not seen & 1)
            case ("receive", bytes(data)):
                uart.receive(data)
            case ("sent", int(count)):
                uart.sent(count)
            case ("connect", bool(there)):
                uart.connect(there)
            case _:
                uart.reset()
        assert 0 <= uart.room <= uart.capacity
        assert len(uart.outgoing) <= uart.capacity
        assert uart.divisor < 1 << 16


@given(st.lists(st.one_of(st.binary(min_size=1, max_size=30), st.integers(1, 40)), max_size=40))
def test_nothing_is_lost_while_the_peer_asks_for_room(actions: list[bytes | int]) -> None:
    uart = Uart()
    uart.write(FCR, 0x81)
    queue, seen, given_ = deque[int](), bytearray(), bytearray()
    for action in actions:
        if isinstance(action, bytes):
            queue.extend(action)
            given_ += action
        else:
            for _ in range(action):
                if uart.read(LSR) & 1:
                    seen.append(uart.read(RBR))
        take = min(uart.room, len(queue))
        uart.receive(bytes(queue.popleft() for _ in range(take)))
        assert not uart.read(LSR) & 0x02
    while uart.read(LSR) & 1:
        seen.append(uart.read(RBR))
    assert bytes(seen) + bytes(queue) == bytes(given_)
