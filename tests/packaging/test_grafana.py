"""The chart's dashboards, read by the types that Grafana Labs publishes."""

import json
from pathlib import Path

import pytest

from tests.packaging import grafana

BOARDS = sorted((Path(__file__).parents[2] / "charts/moe-operator/dashboards").glob("*.json"))


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_grafanas_types_know_every_field_of_a_dashboard(path):
    assert grafana.problems(json.loads(path.read_text())) == []


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("refreshes", "30s", "dashboard.refreshes is unknown"),
        ("graphTooltip", 7, "dashboard.graphTooltip is 7"),
        ("editable", "yes", "dashboard.editable is 'yes'"),
        ("tags", "moe", "dashboard.tags is 'moe'"),
        ("time", {"from": 3}, "dashboard.time.from is 3"),
        ("templating.list.1.multi", 1, "multi is 1"),
        ("templating.list.1.type", "querry", "type is 'querry'"),
        ("panels.0.type", "timeserie", "panels[0].type is 'timeserie'"),
        ("panels.0.gridPos.width", 3, "panels[0].gridPos.width is unknown"),
        ("panels.0.gridPos.w", "12", "panels[0].gridPos.w is '12'"),
        ("panels.0.fieldConfig.defaults.unit", "second", "unit is 'second'"),
        ("panels.0.fieldConfig.defaults.min", "0", "min is '0'"),
        ("panels.0.fieldConfig.defaults.custom.linewidth", 1, "custom.linewidth is unknown"),
        ("panels.0.fieldConfig.defaults.custom.showPoints", "seldom", "showPoints is 'seldom'"),
        ("panels.0.options.legend.displayMode", "grid", "displayMode is 'grid'"),
        ("panels.0.options.legend.calcs.0", 3, "calcs[0] is 3"),
        ("panels.0.options.legnd", {}, "options.legnd is unknown"),
        ("panels.0.targets.0.legend", "x", "targets[0].legend is unknown"),
        ("panels.0.targets.0.expr", 3, "targets[0].expr is 3"),
        ("panels.0.datasource.type", "promtheus", "unknown data source"),
        ("panels.0.options", [], "panels[0].options is []"),
        ("panels.0.targets", {"A": 1}, "panels[0].targets is {'A': 1}"),
        ("panels.0.gridPos", None, "cannot be read"),
    ],
)
def test_a_wrong_field_is_noticed(place, value, said):
    board = json.loads((BOARDS[0].parent / "experts.json").read_text())
    *path, last = (int(word) if word.isdigit() else word for word in place.split("."))
    inner = board
    for word in path:
        inner = inner[word]
    inner[last] = value
    (problem,) = grafana.problems(board)
    assert said in problem
