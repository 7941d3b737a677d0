"""A seccomp filter from a policy: classic BPF over ``struct seccomp_data`` (``seccomp(2)``). Values in, bytes out.

A filter first looks at the machine, because numbers mean something else on another one; then at the number; and for
some calls at their arguments. Every call is a block of its own, so that no jump is longer than its block. The kernel
works out beforehand which numbers pass whatever their arguments are, and does not run the filter for those
(``seccomp_cache_prepare``).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Final

from msgspec import Struct

from vfiod.server.sandbox.calls import Machine

__all__ = ["ALLOW", "KILL", "MAX_INSTRUCTIONS", "Test", "program", "refuse"]

ALLOW: Final = 0x7FFF0000
"""SECCOMP_RET_ALLOW, ``<linux/seccomp.h>``."""

KILL: Final = 0x80000000
"""SECCOMP_RET_KILL_PROCESS."""

MAX_INSTRUCTIONS: Final = 4096
"""BPF_MAXINSNS, ``<linux/bpf_common.h>``."""

_RET_ERRNO: Final = 0x00050000

# <linux/bpf_common.h>: class, size or operation, source.
_LOAD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
_AND: Final = 0x54  # BPF_ALU | BPF_AND | BPF_K
_JUMP_EQUAL: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_JUMP_SET: Final = 0x45  # BPF_JMP | BPF_JSET | BPF_K
_RETURN: Final = 0x06  # BPF_RET | BPF_K

# struct seccomp_data: int nr; __u32 arch; __u64 instruction_pointer; __u64 args[6]
_NUMBER: Final = 0
_ARCH: Final = 4
_ARGUMENTS: Final = 16

_WORD: Final = 0xFFFFFFFF

Instruction = tuple[int, int, int, int]
"""``struct sock_filter``: code, jump when true, jump when false, operand."""


def refuse(errno: int) -> int:
    """What makes a call fail with this error."""
    return _RET_ERRNO | errno


class Test(Struct, frozen=True):
    """``argument & mask == value``.

    Attributes:
        argument: which, 0 to 5.
        value: at most 64 bits.
        mask: at most 64 bits. The high half is looked at only where this says so: the kernel takes many arguments as
        ``int``.

    """

    argument: int
    value: int
    mask: int = _WORD


Alternatives = Sequence[Sequence[Test]]
"""A call passes when all tests of any alternative hold."""


def program(
    machine: Machine,
    allowed: Sequence[int],
    judged: Mapping[int, Alternatives],
    killed: Sequence[int],
    special: Mapping[int, int],
    otherwise: int,
) -> bytes:
    """A whole filter, ``struct sock_filter[]`` in the machine's own byte order.

    Args:
        machine: what to run on.
        allowed: numbers that pass.
        judged: numbers that pass when their arguments do, and else are treated as unknown ones.
        killed: numbers that end the process.
        special: numbers with an action of their own.
        otherwise: what happens to every other call.

    Raises ValueError when it is longer than the kernel takes, or a block too long for its jumps.

    """
    code: list[Instruction] = [
        (_LOAD, 0, 0, _ARCH),
        (_JUMP_EQUAL, 1, 0, machine.audit),
        (_RETURN, 0, 0, KILL),
        (_LOAD, 0, 0, _NUMBER),
    ]
    if machine.foreign_bit:
        code += [(_JUMP_SET, 0, 1, machine.foreign_bit), (_RETURN, 0, 0, KILL)]
    for number, alternatives in judged.items():
        code += _when(number, _judge(machine, alternatives, otherwise))
    for number in allowed:
        code += _when(number, [(_RETURN, 0, 0, ALLOW)])
    for number, action in special.items():
        code += _when(number, [(_RETURN, 0, 0, action)])
    for number in killed:
        code += _when(number, [(_RETURN, 0, 0, KILL)])
    code.append((_RETURN, 0, 0, otherwise))
    if len(code) > MAX_INSTRUCTIONS:
        raise ValueError(f"A filter of {len(code)} instructions: the kernel takes {MAX_INSTRUCTIONS}")
    pack = struct.Struct((">" if machine.big_endian else "<") + "HBBI").pack
    return b"".join([pack(*one) for one in code])


def _when(number: int, block: list[Instruction]) -> list[Instruction]:
    return [(_JUMP_EQUAL, 0, _short(len(block)), number), *block]


def _judge(machine: Machine, alternatives: Alternatives, otherwise: int) -> list[Instruction]:
    """Allow when an alternative holds, else ``otherwise``. Every way through ends in a return."""
    code: list[Instruction] = []
    for tests in alternatives:
        steps = [step for test in tests for step in _compare(machine, test)]
        # Where a comparison fails is behind this alternative's own "allow".
        end = len(steps)
        for place, (operation, _, _, operand) in enumerate(steps):
            if operation == _JUMP_EQUAL:
                steps[place] = (operation, 0, _short(end - place), operand)
        code += [*steps, (_RETURN, 0, 0, ALLOW)]
    return [*code, (_RETURN, 0, 0, otherwise)]


def _compare(machine: Machine, test: Test) -> list[Instruction]:
    low = _ARGUMENTS + 8 * test.argument + 4 * machine.big_endian
    high = _ARGUMENTS + 8 * test.argument + 4 * (not machine.big_endian)
    code: list[Instruction] = []
    for place, shift in ((low, 0), (high, 32)):
        mask, value = test.mask >> shift & _WORD, test.value >> shift & _WORD
        if mask:
            code.append((_LOAD, 0, 0, place))
            if mask != _WORD:
                code.append((_AND, 0, 0, mask))
            code.append((_JUMP_EQUAL, 0, 0, value))
    return code


def _short(distance: int) -> int:
    if distance > 0xFF:
        raise ValueError(f"A jump over {distance} instructions: BPF has 255")
    return distance
