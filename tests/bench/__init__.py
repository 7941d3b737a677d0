"""Benchmarks: ratios to peers measured in the same run. ``make bench``, or ``python -m tests.bench``."""
