"""A running machine as a value: what another process needs, besides the fds, to go on where this one stopped.

The objects of every floor describe themselves in these classes, and are made again from them. Used by the hand-over
to a new process, and by whatever keeps the fds while there is none.
"""
