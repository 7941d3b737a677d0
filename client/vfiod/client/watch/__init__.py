"""``vfiod watch``: servers as one moving picture.

* :mod:`~vfiod.client.watch.program`: the command line.
* :mod:`~vfiod.client.watch.live`: follows the servers, reads the keyboard, draws; and the one picture of a pipe.
* :mod:`~vfiod.client.watch.picture`: what was seen, and what it says about speed. No I/O.
* :mod:`~vfiod.client.watch.view`: what the person looks at, and what each key does to it. No I/O.
* :mod:`~vfiod.client.watch.draw`: both as lines of text, for a terminal of any size. No I/O.
"""
