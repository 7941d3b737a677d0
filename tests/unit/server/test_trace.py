"""Trace points: cheap when off, one line when on, switched by name or pattern."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from vfiod.server import trace


@pytest.fixture(autouse=True)
def _all_off() -> Iterator[None]:
    yield
    trace.switch("*", False)


def test_every_point_is_the_modules_attribute_of_its_name() -> None:
    for name, point in trace.POINTS.items():
        assert getattr(trace, name) is point
        assert point.meaning
        assert not point.on


def test_on_it_writes_one_line_whatever_the_level_of_the_rest(caplog: pytest.LogCaptureFixture) -> None:
    assert trace.switch("irq_eoi", True) == 1
    assert trace.irq_eoi.on
    assert not trace.irq_fired.on
    trace.irq_eoi(device="nic0", index=0)
    trace.irq_fired(device="nic0", index=0)
    assert [record.getMessage() for record in caplog.records] == ["irq_eoi device=nic0 index=0"]
    assert logging.getLogger("vfiod.trace").isEnabledFor(logging.INFO)


def test_patterns_match_as_in_qemu() -> None:
    assert {point.name for point in trace.matching("mapping_*")} == {"mapping_made", "mapping_removed"}
    assert {point.name for point in trace.matching("reset_?????")} == {"reset_begin"}
    assert list(trace.matching("[a-z]*")) == []  # no sets: "[" is a character like others
    assert trace.switch("nothing*", True) == 0


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ValueError, match="twice"):
        trace.TracePoint("irq_eoi", "again")


@pytest.mark.parametrize(
    "what",
    [
        "group_found", "device_populated_region", "device_populated_irq", "device_realized", "device_removed",
        "container_made", "container_closed", "mapping_made", "mapping_removed", "irq_fired", "irq_pending",
        "irq_pending_injected", "irq_eoi", "irq_unmask", "fast_path_on", "fast_path_off", "timer_still_active",
        "direct_started_level", "direct_started_edge", "direct_ended", "vector_used", "vector_released",
        "route_moved", "config_read", "config_write", "region_read", "region_write", "reset_begin", "reset_end",
        "ccw_request", "ccw_result", "mdev_created", "mdev_started", "mdev_shut_down", "mdev_destroyed",
        "export_attached", "export_detached",
    ],
)  # fmt: skip
def test_the_points_of_the_reference_are_there(what: str) -> None:
    assert what in trace.POINTS
