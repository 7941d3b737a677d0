"""What outlives a crash of the server: its fds in a store outside, its state in memory beside them.

The store is the service manager's (``FDSTORE=1`` of ``sd_notify(3)``), or that of ``vfiod keeper``, which speaks the
same. ``slots`` is the state's memory, ``fdstore`` the conversation, ``current`` keeps both up to date, ``restore``
makes a machine of what a dead server has left.
"""
