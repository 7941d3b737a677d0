"""The device server: one process for one VM, beside its hypervisor.

Its floors, from the outside in; each imports only what stands below it (the linter holds it to that):

* ``program``: options, sockets, signals, the order in which things end.
* ``monitor``: sessions and transports; the dialects; dispatch through jsonrpcserver.
* ``commands``: one thin function per command.
* ``machine``: everything the VM has.
* ``devices``, ``interrupts``, ``dma``, ``backends``, ``mdev``, ``kernel``: what a device is made of.
* ``events``, ``trace``, ``lanes``, ``fds``: what all of them use.

Values are ``msgspec.Struct`` classes and not dataclasses: making sixty dataclasses took longer, at every start, than
importing all of asyncio.
"""
