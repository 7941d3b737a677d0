"""Whole machines against a simple model (issue 7: "A model"). A long run: ``make fuzz``."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings
from tests.fuzz.model.machine import MachineModel

LONG = int(os.environ.get("VFIOD_FUZZ_EXAMPLES", "100"))

TestMachines = MachineModel.TestCase
TestMachines.settings = settings(
    # A short run is the same run every time: it cannot fail by chance.
    derandomize=LONG <= 100,
    database=None,
    max_examples=10 if LONG <= 100 else LONG // 10,
    stateful_step_count=40 if LONG <= 100 else 60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
