"""The monitor: sockets, sessions, dialects, and dispatch through jsonrpcserver."""
