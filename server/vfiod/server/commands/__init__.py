"""One thin function per command, by family. No logic of its own.

Each module exports ``HANDLERS``; :mod:`~vfiod.server.commands.table` is all of them, by the command's name.
"""
