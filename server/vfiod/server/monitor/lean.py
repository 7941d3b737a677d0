"""jsonrpcserver without what a running server never touches.

``import jsonrpcserver`` costs about as much as the rest of the server together: its ``__init__`` brings an HTTP
server and the JSON schema validator, and ``oslash``, whose ``Either`` it uses, brings a dozen other monads. vfiod
needs ``dispatcher.call`` and the results alone (the reference on performance, "Where jsonrpcserver spends").

So both packages stand in ``sys.modules`` as packages whose ``__init__`` has not run yet; their submodules load as
usual. Whoever asks one of them for anything else (``from jsonrpcserver import method``) makes its ``__init__`` run
then, and finds all of it, with the very same submodules. When a package is not laid out as expected, the plain
import is made, and nothing but time is lost.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from jsonrpcserver import async_dispatcher, dispatcher
    from jsonrpcserver.request import Request
    from jsonrpcserver.result import ErrorResult, Result, SuccessResult
    from oslash.either import Left, Right

__all__ = ["NOID", "ErrorResult", "Left", "Request", "Result", "Right", "SuccessResult", "async_call", "call"]

PACKAGES: Final = ("oslash", "jsonrpcserver")
MODULES: Final = ("jsonrpcserver.dispatcher", "jsonrpcserver.async_dispatcher")


def _lazy(name: str) -> ModuleType:
    """A package whose submodules can be imported, and whose ``__init__`` runs when it is needed. Raises ImportError."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.submodule_search_locations is None or spec.loader is None:
        raise ImportError(f"{name} is no package", name=name)
    package = importlib.util.module_from_spec(spec)
    loader = spec.loader

    def load_all(attribute: str) -> Any:
        # Tools look for special names in every module; only these say something of the package's contents.
        if attribute.startswith("__") and attribute not in ("__all__", "__version__"):
            raise AttributeError(f"module {name!r} has no attribute {attribute!r}")
        if package.__dict__.pop("__getattr__", None) is None:
            raise AttributeError(f"module {name!r} has no attribute {attribute!r}")
        loader.exec_module(package)
        return getattr(package, attribute)

    package.__dict__["__getattr__"] = load_all  # PEP 562
    return package


def load(modules: tuple[str, ...] = MODULES, packages: tuple[str, ...] = PACKAGES) -> bool:
    """Import the modules, leanly if that works; returns whether it did. Raises ImportError when they are not there."""
    before = set(sys.modules)
    try:
        for name in packages:
            if name not in sys.modules:
                sys.modules[name] = _lazy(name)
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
    return True


if not TYPE_CHECKING:
    LEAN: Final = load()
    dispatcher = sys.modules["jsonrpcserver.dispatcher"]
    async_dispatcher = sys.modules["jsonrpcserver.async_dispatcher"]
    Request = dispatcher.Request
    Result = dispatcher.Result
    # What its Success() and Error() make, without the cost of calling them.
    SuccessResult = sys.modules["jsonrpcserver.result"].SuccessResult
    ErrorResult = sys.modules["jsonrpcserver.result"].ErrorResult
    Left = sys.modules["oslash.either"].Left
    Right = sys.modules["oslash.either"].Right

call = dispatcher.call
"""``call(request, context, method) -> Result``: calls the handler and shapes what comes back."""

async_call = async_dispatcher.call
"""The same for a handler that must be awaited."""

NOID = sys.modules["jsonrpcserver.sentinels"].NOID
