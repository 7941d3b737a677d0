"""The dialects of the monitor: from a byte stream to requests, and back.

======================  ==========================================================================
:mod:`.stream`          bytes as they come -> complete JSON texts, resynchronised as QEMU does
:mod:`.text`            the lenient JSON of QMP, its exact rules and QEMU's words for what is wrong
:mod:`.qmp`             texts <-> QMP messages, both sides
:mod:`.jsonrpc`         texts <-> JSON-RPC 2.0 messages, both sides
:mod:`.arguments`       a command's arguments and results <-> the catalogue's classes
======================  ==========================================================================
"""
