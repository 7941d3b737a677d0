"""A new process takes the place of a running one: every fd and all state, without anybody losing anything.

``describe`` and ``rebuild`` turn a server into a description with fds, and back; ``conversation`` is what the two
processes say to each other, without I/O; ``giver`` and ``taker`` are the two ends.
"""
