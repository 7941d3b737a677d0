"""The table of metrics, the page about it and the dashboard agree."""

from __future__ import annotations

import json
import re
from pathlib import Path

from vfiod.server.monitor.metrics import METRICS, Kind

ROOT = Path(__file__).parents[4]
NAMES = {metric.name + ("_total" if metric.kind is Kind.COUNTER else "") for metric in METRICS} | {"vfiod_info"}


def test_each_metric_is_on_the_page_and_named_by_the_rules() -> None:
    """OpenMetrics: a unit is the end of the name; a name once; none ends in _total by itself."""
    page = (ROOT / "docs/metrics.md").read_text()
    for metric in METRICS:
        total = "_total" if metric.kind is Kind.COUNTER else ""
        assert f"| `{metric.name}{total}` | {metric.kind} | {metric.help} |" in page
        assert re.fullmatch(r"vfiod_[a-z_]+", metric.name)
        assert metric.name.endswith(metric.unit)
        assert not metric.name.endswith("_total")
    assert len({metric.name for metric in METRICS}) == len(METRICS)


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    """Every name in every expression is one of the table."""
    dashboard = json.loads((ROOT / "examples/grafana.json").read_text())
    used = set(re.findall(r"vfiod_[a-z_]+", json.dumps(dashboard["panels"]) + json.dumps(dashboard["templating"])))
    assert used and used <= NAMES
