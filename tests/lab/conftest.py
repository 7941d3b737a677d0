"""Runs the modules of ``guest/`` inside lab machines, and reports each of their tests as the host's own.

The host collects the guest's modules like any others: same ids, same ``-k``, same ``-m``. Only
running them is different. The selected tests of one ``MACHINE`` are handed to a real pytest in
a guest that boots once; ``tests/lab/reporter.py`` writes every report there as a line of JSON
while it happens, and here each becomes the report of its host item, with the guest's traceback
and captured output. (JUnit XML, which pytest can write by itself, comes only at the end: a
guest that dies would take all results with it.)

As many guests as ``GUESTS`` run at once, one of them beside the host's own tests. Their reports are told
in the order of the items all the same.

In the guest this file is not loaded (``--confcutdir``).
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any, Literal

import pytest

REPO = Path(__file__).resolve().parents[2]
if str(REPO) not in sys.path:  # so that ``tests.lab`` is importable however pytest was started
    sys.path.insert(0, str(REPO))

from tests.lab import launch  # noqa: E402
from tests.lab.places import GUEST_EXCHANGE, TEST_SECONDS, GuestDiedError, LabUnavailableError  # noqa: E402
from tests.lab.topologies import find_topology  # noqa: E402

#: Seconds for a guest to say that a test took too long, and to end.
GRACE_SECONDS = 60.0

GUEST_TESTS = Path(__file__).parent / "guest"
#: Set where the lab must run (``make lab``): what cannot run fails instead of being skipped.
REQUIRED = os.environ.get("VFIOD_LAB_REQUIRED", "") not in ("", "0")
#: Machines at once. A guest's tests are mostly one process waiting for another, so one seldom needs two processors;
#: more than two only take each other's time.
GUESTS = int(os.environ.get("VFIOD_LAB_GUESTS") or min(2, os.cpu_count() or 1))


class Batch:
    """The selected tests of one machine: boots it when told, and keeps the reports that come from there."""

    def __init__(self, machine: str, items: list[pytest.Item]) -> None:
        self.machine = machine
        self.items = items
        self.begun = False
        #: Why the first machine ended, where there was a second.
        self.hung: str | None = None
        self.guest: launch.Guest | None = None
        self.failure: str | None = None
        self.skip: str | None = None
        self.reports: dict[str, list[dict[str, Any]]] = {}
        self.finished: set[str] = set()
        self.collect_errors: list[str] = []
        self.running: str | None = None
        self._read = 0
        self._partial = b""
        self._heard = 0.0

    def start(self) -> None:
        """Boot the machine; a failure to do so is kept for every item."""
        self.begun = True
        reason = launch.unavailable_reason(find_topology(self.machine))
        if reason is not None:
            if REQUIRED:
                self.failure = f"the lab is required here and cannot run: {reason}"
            else:
                self.skip = f"no lab here: {reason}"
            return
        # All that pytest needs and nothing of the host's own options: see guest/guest.ini.
        command = shlex.join(
            [
                *("python", "-m", "pytest", "-c", str(GUEST_TESTS / "guest.ini"), f"--rootdir={REPO}"),
                *(f"--confcutdir={GUEST_TESTS}", "-p", "tests.lab.reporter", f"@{GUEST_EXCHANGE}/tests"),
            ]
        )
        self.guest = launch.Guest(
            find_topology(self.machine),
            command,
            environment={
                # The limits of the reporter, and whatever else a person wants a test to see.
                **{name: value for name, value in os.environ.items() if name.startswith("VFIOD_")},
                "VFIOD_LAB_MACHINE": self.machine,
                "VFIOD_LAB_REPORTS": f"{GUEST_EXCHANGE}/reports",
                # Entry points of the host's other plugins cost seconds of import in emulation.
                "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            },
        )
        left = [guest_id(item) for item in self.items if guest_id(item) not in self.finished]
        (self.guest.exchange / "tests").write_text("".join(f"{name}\n" for name in left))
        self._read, self._partial, self._heard = 0, b"", time.monotonic()
        try:
            self.guest.start()
        except LabUnavailableError as error:
            self.failure = str(error)
            self.close()

    def step(self) -> None:
        """Take in what the guest reported meanwhile; when it is over, end it: nothing more comes."""
        if self.guest is None:
            return
        going = False
        try:
            going = self.guest.check()
        except GuestDiedError as error:
            self.failure = str(error)
        self._read_reports()  # what it said before it died counts
        if going and time.monotonic() - self._heard > self.silence:
            going = False
            self.failure = f"the guest reported nothing for {self.silence:.0f} s\n{self.guest.tails()}"
            if self.hung is None:
                # Emulated machines stop now and then: processors idle, timers and interrupts gone, whatever runs. What
                # hangs by our doing hangs again.
                self.hung, self.failure = f"{self.running}: {self.failure}", None
                print(
                    f"\nlab: machine {self.machine} starts again, for what is left of it: {self.hung}", file=sys.stderr
                )
                self.close()
                self.start()
                return
        if going:
            return
        if self.failure is None:
            # Only those see it that have no result.
            self.failure = (
                f"the guest's pytest ended with {self.guest.status} and without a result for this test\n"
                + "\n".join(self.collect_errors)
                + self.guest.tails()
            )
        self.close()

    @property
    def silence(self) -> float:
        """Seconds without a report after which the machine has stopped: one that runs ends such a test by itself."""
        for item in self.items:
            if guest_id(item) == self.running:
                module = item.getparent(pytest.Module)
                return max(TEST_SECONDS, getattr(module.obj, "TEST_SECONDS", 0.0) if module else 0.0) + GRACE_SECONDS
        return launch.BOOT_SECONDS + GRACE_SECONDS

    @property
    def over(self) -> bool:
        """Whether nothing more will come from the guest."""
        return self.begun and self.guest is None

    def _read_reports(self) -> None:
        assert self.guest is not None
        try:
            with (self.guest.exchange / "reports").open("rb") as stream:
                stream.seek(self._read)
                data = stream.read()
        except FileNotFoundError:
            return
        self._read += len(data)
        if data:
            self._heard = time.monotonic()
        *lines, self._partial = (self._partial + data).split(b"\n")
        for line in lines:
            record = json.loads(line)
            match record["kind"]:
                case "start":
                    self.running = record["test"]
                    self.reports[record["test"]] = []
                case "report":
                    self.reports.setdefault(record["test"], []).append(record["data"])
                case "finish":
                    self.running = None
                    self.finished.add(record["test"])
                case "collect-error":
                    self.collect_errors.append(record["text"])

    def explain(self, item: pytest.Item) -> str:
        """Return why ``item`` has no result."""
        name = guest_id(item)
        if self.running == name:
            where = "this test was running when the guest ended:"
        elif self.running is not None:
            where = f"not run: the guest ended during {self.running}:"
        else:
            where = "not run:"
        return f"{where} {self.failure}"

    def close(self) -> None:
        """End the guest."""
        guest, self.guest = self.guest, None
        if guest is not None:
            guest.close()


class Lab:
    """All batches of this run, and the one thing they share: how many machines the processors can carry."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def step(self, room: int) -> None:
        """Look at every machine that runs, and start the next ones while fewer than ``room`` do."""
        for batch in self.batches:
            batch.step()
        running = sum(batch.guest is not None for batch in self.batches)
        for batch in self.batches:
            if running >= room:
                return
            if not batch.begun:
                batch.start()
                running += batch.guest is not None

    def results(self, item: pytest.Item) -> list[dict[str, Any]]:
        """Wait until the guest is done with ``item`` and give its reports; none if it never came to that."""
        batch, name = item.stash[_BATCH], guest_id(item)
        while name not in batch.finished and not batch.over:
            self.step(GUESTS)
            if name not in batch.finished and not batch.over:
                time.sleep(0.05)
        return batch.reports[name] if name in batch.finished else []

    def close(self) -> None:
        """End every guest."""
        for batch in self.batches:
            batch.close()


_LAB = pytest.StashKey[Lab]()
_BATCH = pytest.StashKey[Batch]()


def guest_id(item: pytest.Item) -> str:
    """Return the node id the guest's pytest gives ``item``: relative to the repository, whatever our rootdir."""
    _, separator, rest = item.nodeid.partition("::")
    return f"{item.path.relative_to(REPO)}{separator}{rest}"


def machine_of(item: pytest.Item) -> str | None:
    """Return the ``MACHINE`` of the guest test ``item``, or None for a test of the host."""
    if not item.path.is_relative_to(GUEST_TESTS):
        return None
    module = item.getparent(pytest.Module)
    machine = getattr(module.obj, "MACHINE", None) if module is not None else None
    if not isinstance(machine, str):
        raise pytest.UsageError(f"{item.path}: a guest module says which machine it needs: MACHINE = 'name'")
    return machine


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "lab: runs inside an emulated machine with a real kernel (make lab)")
    config.stash[_LAB] = Lab()


def pytest_itemcollected(item: pytest.Item) -> None:
    # Early, so that -m sees it.
    if item.path.is_relative_to(GUEST_TESTS):
        item.add_marker("lab")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # After -k and -m had their say: what is left is what the guest is asked to run.
    machines: dict[str, list[pytest.Item]] = {}
    for item in items:
        machine = machine_of(item) if item.path.is_relative_to(GUEST_TESTS) else None
        if machine is not None:
            find_topology(machine)
            machines.setdefault(machine, []).append(item)
    # The machine with most tests first: what runs beside it then ends at about the same time.
    for machine, members in sorted(machines.items(), key=lambda one: -len(one[1])):
        batch = Batch(machine, members)
        config.stash[_LAB].batches.append(batch)
        for item in members:
            item.stash[_BATCH] = batch
    grouped = [item for batch in config.stash[_LAB].batches for item in batch.items]
    items[:] = [item for item in items if _BATCH not in item.stash] + grouped


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    lab, batch = item.config.stash[_LAB], item.stash.get(_BATCH, None)
    if batch is None:
        # A machine beside the host's own tests, which may boot one themselves.
        lab.step(GUESTS - 1)
        return None
    hook = item.ihook
    hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    try:
        reports = lab.results(item)
        for data in reports:
            hook.pytest_runtest_logreport(report=revive(item, data))
        if batch.skip is not None:
            location = (str(item.path), (item.location[1] or 0) + 1, f"Skipped: {batch.skip}")
            hook.pytest_runtest_logreport(report=made_up(item, "skipped", location))
        elif not reports:
            hook.pytest_runtest_logreport(report=made_up(item, "failed", batch.explain(item)))
    finally:
        hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def pytest_unconfigure(config: pytest.Config) -> None:
    # Reached on -x and on an interrupt too, when the protocol above was cut short.
    if _LAB in config.stash:
        config.stash[_LAB].close()


def made_up(item: pytest.Item, outcome: Any, longrepr: Any) -> pytest.TestReport:
    """Return a report of the host's own, for an item the guest never reported on."""
    keywords: dict[str, Literal[1]] = dict.fromkeys(item.keywords, 1)
    return pytest.TestReport(item.nodeid, item.location, keywords, outcome, longrepr, "setup")


def revive(item: pytest.Item, data: dict[str, Any]) -> pytest.TestReport:
    """Return the guest's report as a report of this process. JSON has no tuples; pytest insists on some."""
    if data["outcome"] == "skipped" and isinstance(data["longrepr"], list):
        data["longrepr"] = tuple(data["longrepr"])
    data["sections"] = [tuple(section) for section in data["sections"]]
    data["user_properties"] = [tuple(entry) for entry in data["user_properties"]]
    data["nodeid"], data["location"] = item.nodeid, item.location
    report = item.config.hook.pytest_report_from_serializable(config=item.config, data=data)
    assert isinstance(report, pytest.TestReport)
    return report
