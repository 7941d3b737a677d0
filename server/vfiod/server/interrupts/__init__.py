"""Interrupt lines and their state machines, free of I/O: calls go in, actions come out."""
