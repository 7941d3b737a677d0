"""How hard to try: ``VFIOD_FUZZ_EXAMPLES=20000 python -m pytest tests/fuzz`` for a long run."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# No deadline: a test passes or fails for what it finds, never for how long the machine took.
settings.register_profile(
    "vfiod",
    deadline=None,
    max_examples=int(os.environ.get("VFIOD_FUZZ_EXAMPLES", "100")),
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
settings.load_profile("vfiod")
