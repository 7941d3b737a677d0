"""A pytest plugin for guests: hypothesis with few examples and no time limit for one; emulation is slow."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("guest", max_examples=10, deadline=None, database=None)
settings.load_profile("guest")
