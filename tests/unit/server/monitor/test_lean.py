"""jsonrpcserver without its heavy parts: what is loaded, what is not, and what is left for others."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]


def _run(script: str, tmp_path: Path, *path: str) -> str:
    """In a fresh interpreter: what this test process has imported must not matter."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(script)],
        cwd=tmp_path,
        env={"PYTHONPATH": ":".join([*path, str(ROOT / "protocol"), str(ROOT / "server")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_neither_http_nor_the_schema_validator_is_loaded(tmp_path: Path) -> None:
    script = """
        import sys
        from vfiod.server.monitor import lean
        heavy = {"http.server", "jsonschema", "jsonrpcserver.main", "oslash.list"} & set(sys.modules)
        method = lambda context, argument: lean.Right(lean.SuccessResult(context + argument))
        print(lean.LEAN, heavy, lean.call(lean.Request("m", [2], lean.NOID), 1, method)._value.result)
    """
    assert _run(script, tmp_path) == "True set() 3"


def test_a_plain_import_afterwards_gives_all_of_it_with_the_same_parts(tmp_path: Path) -> None:
    script = """
        from vfiod.server.monitor import lean
        import jsonrpcserver
        import jsonrpcserver.dispatcher
        @jsonrpcserver.method
        def ping():
            return jsonrpcserver.Success("pong")
        print(isinstance(jsonrpcserver.Success(1), lean.Right), jsonrpcserver.dispatcher.call is lean.call)
        print(jsonrpcserver.dispatch('{"jsonrpc": "2.0", "method": "ping", "id": 1}'))
    """
    assert _run(script, tmp_path) == 'True True\n{"jsonrpc": "2.0", "result": "pong", "id": 1}'


def test_imported_before_it_is_taken_as_it_is(tmp_path: Path) -> None:
    script = """
        import jsonrpcserver
        from vfiod.server.monitor import lean
        print(lean.LEAN, isinstance(jsonrpcserver.Success(1), lean.Right))
    """
    assert _run(script, tmp_path) == "True True"


@pytest.mark.parametrize("layout", ["init-sets-up", "module"])
def test_another_layout_gets_the_plain_import(tmp_path: Path, layout: str) -> None:
    """A package that cannot be loaded in this order, and one that is a module: both load as their authors meant."""
    if layout == "init-sets-up":
        package = tmp_path / "other"
        package.mkdir()
        (package / "__init__.py").write_text("import sys\nsys.other_is_ready = ready = True\n")
        (package / "part.py").write_text(
            "import sys\nif not hasattr(sys, 'other_is_ready'): raise ImportError\nready = True\n"
        )
        wanted = "other.part"
    else:
        (tmp_path / "other.py").write_text("ready = True\n")
        wanted = "other"
    script = f"""
        import sys
        from vfiod.server.monitor import lean
        print(lean.load(("{wanted}",), ("other",)), sys.modules["{wanted}"].ready, sys.modules["other"].ready)
    """
    assert _run(script, tmp_path, str(tmp_path)) == "False True True"


def test_special_names_do_not_run_the_init_and_unknown_ones_are_errors(tmp_path: Path) -> None:
    script = """
        import sys
        from vfiod.server.monitor import lean
        import jsonrpcserver
        print(hasattr(jsonrpcserver, "__wrapped__"), "jsonrpcserver.main" in sys.modules, jsonrpcserver.__name__)
        print(hasattr(jsonrpcserver, "nothing"), "jsonrpcserver.main" in sys.modules, "serve" in jsonrpcserver.__all__)
    """
    assert _run(script, tmp_path) == "False False jsonrpcserver\nFalse True True"


def test_what_is_not_there_is_an_import_error(tmp_path: Path) -> None:
    script = """
        from vfiod.server.monitor import lean
        try:
            lean.load(("absent_package.part",), ("absent_package",))
        except ImportError as error:
            print(error.name)
    """
    assert _run(script, tmp_path) == "absent_package"
