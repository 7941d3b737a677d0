"""jsonrpcserver without what a running server never touches.

``import jsonrpcserver`` costs about as much as the rest of the server together: its ``__init__`` brings an HTTP
server and the JSON schema validator, and ``oslash``, whose ``Either`` it uses, brings a dozen other monads. vfiod
needs ``dispatcher.call`` and the results alone (the reference on performance, "Where jsonrpcserver spends").

So for the time of loading, both packages stand in ``sys.modules`` as bare packages, whose ``__init__`` has not run;
their submodules load as usual. Afterwards the bare packages are taken away again: who imports jsonrpcserver later, the
plain way, gets all of it, with the very same submodules. When a package is not laid out as expected, the plain
import is made, and nothing but time is lost.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from jsonrpcserver import async_dispatcher, dispatcher
    from jsonrpcserver.request import Request
    from jsonrpcserver.result import Error, Result, Success

__all__ = ["NOID", "Error", "Request", "Result", "Success", "async_call", "call"]

PACKAGES: Final = ("oslash", "jsonrpcserver")
MODULES: Final = ("jsonrpcserver.dispatcher", "jsonrpcserver.async_dispatcher")


def _bare(name: str) -> ModuleType:
    """A package whose submodules can be imported, and whose ``__init__`` has not run. Raises ImportError."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError(f"{name} is no package")
    package = ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations)
    package.__spec__ = spec
    return package


def load(modules: tuple[str, ...] = MODULES, packages: tuple[str, ...] = PACKAGES) -> bool:
    """Import the modules, leanly if that works; returns whether it did. Raises ImportError when they are not there."""
    before = set(sys.modules)
    bare = {}
    try:
        for name in packages:
            if name not in sys.modules:
                bare[name] = sys.modules[name] = _bare(name)
        for name in modules:
            importlib.import_module(name)
    except (ImportError, AttributeError):
        # Not the layout we know. Forget what was half loaded, and load it as its authors meant it.
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in packages:
                del sys.modules[name]
        for name in modules:
            importlib.import_module(name)
        return False
    finally:
        for name, package in bare.items():
            if sys.modules.get(name) is package:
                del sys.modules[name]
    return True


if not TYPE_CHECKING:
    LEAN: Final = load()
    dispatcher = sys.modules["jsonrpcserver.dispatcher"]
    async_dispatcher = sys.modules["jsonrpcserver.async_dispatcher"]
    Request = dispatcher.Request
    Result = dispatcher.Result
    Success = sys.modules["jsonrpcserver.result"].Success
    Error = sys.modules["jsonrpcserver.result"].Error

call = dispatcher.call
"""``call(request, context, method) -> Result``: calls the handler and shapes what comes back."""

async_call = async_dispatcher.call
"""The same for a handler that must be awaited."""

NOID = sys.modules["jsonrpcserver.sentinels"].NOID
