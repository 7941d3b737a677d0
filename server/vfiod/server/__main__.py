"""``python -m vfiod.server``: what ``vfiod serve`` executes; with ``mdev-serve``, ``vfiod mdev serve``."""

import gc
import sys

# What start-up makes stays, and the collector would look through all of it again and again. It is switched on when the
# server is ready (program.serve).
gc.disable()

if "ssl" not in sys.modules:
    # asyncio works without ssl where there is none. We speak no TLS, and OpenSSL would cost a twentieth of the start,
    # and in every process 4 MiB of RSS, 2 of PSS. Afterwards it can be imported as ever, by whoever wants it.
    sys.modules["ssl"] = None  # type: ignore[assignment]  # documented: importing it raises ImportError
    import asyncio  # noqa: F401

    del sys.modules["ssl"]

if sys.argv[1:2] == ["mdev-serve"]:
    from vfiod.server.mdev_serve import main as mdev_serve

    sys.exit(mdev_serve(sys.argv[2:]))

from vfiod.server.program import main  # noqa: E402 - after what makes it quick

sys.exit(main())
