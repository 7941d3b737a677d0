"""A pytest plugin for guests: hypothesis with few examples and no time limit for one; emulation is slow."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile(
    "guest", max_examples=10, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("guest")
