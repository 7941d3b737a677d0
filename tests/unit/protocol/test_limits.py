"""Every limit is explained, positive, and fits with its neighbours. That each is kept, its keeper's tests show."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from vfiod.protocol import limits

TREE = ast.parse(Path(limits.__file__).read_text())
NAMES = [node.target.id for node in TREE.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]


def test_each_is_explained() -> None:
    for node, after in zip(TREE.body, [*TREE.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign):
            assert isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant), ast.unparse(node.target)
            assert str(after.value.value).strip().endswith(".")


@pytest.mark.parametrize("name", NAMES)
def test_each_is_a_sensible_number(name: str) -> None:
    value = getattr(limits, name)
    assert isinstance(value, int)
    assert value > 0 or name == "NEGOTIATION_TIMEOUT"


def test_the_largest_transfer_fits_in_a_request_and_in_a_reply() -> None:
    base64 = (limits.MAX_REGION_TRANSFER + 2) // 3 * 4
    assert base64 + 4096 < limits.MAX_MESSAGE_BYTES
    assert base64 + 4096 < limits.MAX_REPLY_BACKLOG
    assert limits.MAX_REPLY_BACKLOG < 10 * 1024 * 1024  # qemu.qmp's line limit


def test_one_full_message_of_fds_can_wait_for_its_command() -> None:
    assert limits.MAX_FDS_PER_MESSAGE <= limits.MAX_PENDING_FDS
    assert limits.MAX_PENDING_FDS <= limits.MAX_NAMED_FDS
