"""For all tests: hypothesis has no deadline. A test passes or fails for what it finds, not for how long that took.

And Ctrl-C is what it is in a terminal: a shell without job control starts what goes to the background with SIGINT
ignored, and so would be all that the tests start.
"""

from __future__ import annotations

import contextlib
import signal

with contextlib.suppress(ImportError):  # some guests of the lab have none
    from hypothesis import HealthCheck, settings

    settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    if settings.default is settings.get_profile("default"):  # else one was chosen: tests/lab/few_examples.py
        settings.load_profile("untimed")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
