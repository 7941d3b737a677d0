"""For all tests: hypothesis has no deadline. A test passes or fails for what it finds, not for how long that took."""

from __future__ import annotations

import contextlib

with contextlib.suppress(ImportError):  # some guests of the lab have none
    from hypothesis import HealthCheck, settings

    settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    if settings.default is settings.get_profile("default"):  # else one was chosen: tests/lab/few_examples.py
        settings.load_profile("untimed")
