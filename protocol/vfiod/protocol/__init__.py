"""The words vfiod speaks: values and their bytes.

Everything here turns bytes into values or values into bytes. Nothing here opens, waits or knows the
time; the linter holds it to that (``pyproject.toml``, "protocol is sans-I/O"). Both the server and
the client stand on this package and on nothing of each other.

* :mod:`~vfiod.protocol.catalogue`: every command and event, declared once.
* :mod:`~vfiod.protocol.wire`: the dialects (QMP, JSON-RPC 2.0) and the stream they arrive in.
* :mod:`~vfiod.protocol.vfio`: the kernel's structures and numbers.
* :mod:`~vfiod.protocol.fd`: a file descriptor with exactly one owner.
* :mod:`~vfiod.protocol.errors`: the tree of errors, and what each is called on the wire.
* :mod:`~vfiod.protocol.limits`: every bound, with its unit and its reason.
"""
