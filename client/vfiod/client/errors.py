"""What can go wrong in the client, beyond what the server answers.

::

    VfiodError
    ├── RemoteError            the server answered with an error: class, sentence, errno
    └── ClientError            no answer came, or none that can be understood
        ├── ConnectFailed        nobody listens there, or it does not let us in      (a ConnectionError too)
        ├── ConnectionLost       the connection ended while something was awaited    (a ConnectionError too)
        ├── RequestTimedOut      no answer within the time given                     (a TimeoutError too)
        └── ProtocolError        what came is not this protocol; the connection is closed

After :class:`RequestTimedOut` the command may still be carried out: the server was not told to stop.
"""

from __future__ import annotations

from vfiod.protocol.errors import RemoteError, VfiodError

__all__ = ["ClientError", "ConnectFailed", "ConnectionLost", "ProtocolError", "RemoteError", "RequestTimedOut"]


class ClientError(VfiodError):
    """No answer came, or none that can be understood."""


class ConnectFailed(ClientError, ConnectionError):
    """Nobody listens there, or it does not let us in. The text names the path and the errno."""


class ConnectionLost(ClientError, ConnectionError):
    """The connection ended: closed here, closed by the server, or the server died."""


class RequestTimedOut(ClientError, TimeoutError):
    """No answer within the time given. The command may still be carried out."""


class ProtocolError(ClientError):
    """What came is not this protocol, or not this version of it."""
