"""A server used for hours: memory, fds and threads stay flat. ``make soak``, or ``python -m tests.soak``."""
