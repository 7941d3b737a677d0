"""Keeps the guest's tests off the host: they bind drivers, reset devices and act as root."""

from __future__ import annotations

import os

import pytest


def pytest_runtest_setup(item: pytest.Item) -> None:
    # ``..../conftest.py`` never lets a guest test come this far on the host. Should it not have been
    # loaded, this is what stands between a test that unbinds drivers and somebody's machine.
    if "VFIOD_LAB_MACHINE" not in os.environ:
        pytest.fail(f"{item.nodeid} runs in a lab machine only; tests/lab/conftest.py was not loaded", pytrace=False)
