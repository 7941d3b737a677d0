"""Channel I/O: the structures of the s390 channel subsystem, channel programs, and status in words.

* :mod:`~vfiod.protocol.channel.orb`, :mod:`~vfiod.protocol.channel.ccw`: what is started.
* :mod:`~vfiod.protocol.channel.scsw`, :mod:`~vfiod.protocol.channel.irb`, :mod:`~vfiod.protocol.channel.schib`,
  :mod:`~vfiod.protocol.channel.sense`: what is told.
* :mod:`~vfiod.protocol.channel.program`: :class:`ChannelProgram` builds a program and lays it out in guest memory.
* :mod:`~vfiod.protocol.channel.words`: what status means, for a person.

All of it is big-endian on every host. Opens nothing, waits for nothing.
"""

from __future__ import annotations

from vfiod.protocol.channel.ccw import BadChannelStructure, Ccw, CcwFlags, Command, Idaws, command_name
from vfiod.protocol.channel.irb import Erw, ErwFlags, Esw, Irb, Sublog
from vfiod.protocol.channel.orb import Orb, OrbFlags
from vfiod.protocol.channel.program import Buffer, ChannelProgram, Laid, Step, check_ccws
from vfiod.protocol.channel.schib import Crw, CrwErc, CrwFlags, CrwRsc, Pmcw, PmcwFlags, Schib
from vfiod.protocol.channel.scsw import Actl, Cstat, Dstat, Fctl, Scsw, ScswFlags, Stctl
from vfiod.protocol.channel.sense import Ciw, SenseByte0, SenseId, sense_words
from vfiod.protocol.channel.words import explain_crw, explain_irb, explain_orb, explain_schib

__all__ = [
    "Actl",
    "BadChannelStructure",
    "Buffer",
    "Ccw",
    "CcwFlags",
    "ChannelProgram",
    "Ciw",
    "Command",
    "Crw",
    "CrwErc",
    "CrwFlags",
    "CrwRsc",
    "Cstat",
    "Dstat",
    "Erw",
    "ErwFlags",
    "Esw",
    "Fctl",
    "Idaws",
    "Irb",
    "Laid",
    "Orb",
    "OrbFlags",
    "Pmcw",
    "PmcwFlags",
    "Schib",
    "Scsw",
    "ScswFlags",
    "SenseByte0",
    "SenseId",
    "Step",
    "Stctl",
    "Sublog",
    "check_ccws",
    "command_name",
    "explain_crw",
    "explain_irb",
    "explain_orb",
    "explain_schib",
    "sense_words",
]
