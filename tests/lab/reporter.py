"""The guest's half of ``conftest.py``: a pytest plugin that writes each report down when it is made.

Loaded in the guest with ``-p tests.lab.reporter``. One JSON object a line, flushed, in the
exchange directory; and a watch on every test, since a test that waits for an interrupt that
never comes would otherwise take the whole guest's time.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from typing import Any

import pytest
from tests.lab.places import TEST_SECONDS

_stream = open(os.environ["VFIOD_LAB_REPORTS"], "w", encoding="utf-8")  # noqa: SIM115  lives as long as pytest
# A duplicate from before pytest captures standard error: tracebacks must reach the output file.
_stderr = os.fdopen(os.dup(sys.__stderr__.fileno() if sys.__stderr__ else 2), "w")


def _write(kind: str, **record: Any) -> None:
    _stream.write(json.dumps({"kind": kind, **record}, default=repr) + "\n")
    _stream.flush()


def pytest_runtest_logstart(nodeid: str) -> None:
    faulthandler.dump_traceback_later(TEST_SECONDS, exit=True, file=_stderr)
    _write("start", test=nodeid)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    module = item.getparent(pytest.Module)
    longer = getattr(module.obj, "TEST_SECONDS", None) if module is not None else None
    if longer is not None:
        faulthandler.dump_traceback_later(max(TEST_SECONDS, float(longer)), exit=True, file=_stderr)


def pytest_runtest_logfinish(nodeid: str) -> None:
    faulthandler.cancel_dump_traceback_later()
    _write("finish", test=nodeid)


_config: pytest.Config


def pytest_configure(config: pytest.Config) -> None:
    global _config
    _config = config


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    data = _config.hook.pytest_report_to_serializable(config=_config, report=report)
    _write("report", test=report.nodeid, data=data)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _write("collect-error", text=f"{report.nodeid}: {report.longreprtext}")


def pytest_unconfigure() -> None:
    _stream.close()
    _stderr.close()
