"""``vfiod monitor``: a person, or a pipe, at a server's monitor.

* :mod:`~vfiod.client.monitor.program`: the command line; a terminal gets the one, a pipe the other.
* :mod:`~vfiod.client.monitor.interactive`: the prompt, with events above it.
* :mod:`~vfiod.client.monitor.filter`: lines in, JSON lines out.
* :mod:`~vfiod.client.monitor.complete`: what may come next in a line, from the catalogue. No I/O.
* :mod:`~vfiod.client.monitor.names`: names that live in the server: ids, fds.
* :mod:`~vfiod.client.monitor.local`: fds by path.
* :mod:`~vfiod.client.monitor.overbus`: the same over a bus.
* :mod:`~vfiod.client.monitor.help`: the catalogue as text.
"""
