"""Grafana's JSON of one dashboard, from a short description of its panels; schema 39: Grafana 10 to 12."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

COLUMNS = 24  # of Grafana's grid
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
BLUE, GREEN, YELLOW, ORANGE, RED = "blue", "green", "#EAB839", "orange", "red"

Steps = tuple[tuple[float | None, str], ...]  # from this value on -> colour; the first from None


@dataclass(frozen=True, slots=True)
class Query:
    """One query and how its series are called.

    Attributes:
        expression: PromQL; `$job` and `$__rate_interval` are Grafana's.
        legend: Grafana's legend, e.g. `{{reason}}`.
        right: drawn on the right axis, in this unit.
        color: of the series; "" leaves it to the palette.
    """

    expression: str
    legend: str = ""
    right: str = ""
    color: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel.

    Attributes:
        title: a few words.
        text: what one sees here, and when to worry.
        kind: stat, timeseries, heatmap, bargauge, table, state-timeline or row.
        queries: what it shows.
        unit: Grafana's name of the unit.
        width: of 24 columns.
        height: in rows of the grid.
        steps: thresholds.
        line: whether the thresholds are drawn as lines.
        stack: series on top of each other.
        decimals: shown; None: Grafana's choice.
        low: least value of the axis; None: Grafana's choice.
        high: largest value of the axis; None: Grafana's choice.
        words: value -> (word, colour), where words say it better.
        log: a logarithmic axis.
        none: shown when there is no data.
    """

    title: str
    text: str = ""
    kind: str = "timeseries"
    queries: Sequence[Query] = ()
    unit: str = "short"
    width: int = 12
    height: int = 8
    steps: Steps = ((None, BLUE),)
    line: bool = False
    stack: bool = False
    decimals: int | None = None
    low: float | None = 0
    high: float | None = None
    words: Mapping[int, tuple[str, str]] = field(default_factory=dict)
    log: bool = False
    none: str = "none"


@dataclass(frozen=True, slots=True)
class Dashboard:
    """One dashboard: its panels are laid out from left to right, row by row."""

    uid: str
    title: str
    text: str
    panels: Sequence[Panel]
    others: Sequence[tuple[str, str]] = ()  # uid, title


def json_of(dashboard: Dashboard) -> dict[str, Any]:
    """Return the dashboard as Grafana reads it."""
    return {
        "uid": dashboard.uid, "title": dashboard.title, "description": dashboard.text, "tags": ["fedmq"],
        "schemaVersion": 39, "version": 1, "editable": True, "graphTooltip": 1, "refresh": "10s",
        "timezone": "browser", "time": {"from": "now-1h", "to": "now"}, "id": None, "annotations": {"list": []},
        "links": [
            {
                "title": "FedMQ", "type": "dashboards", "tags": ["fedmq"], "asDropdown": False, "includeVars": True,
                "keepTime": True, "icon": "external link", "targetBlank": False, "tooltip": "", "url": "",
            }
        ],
        "templating": {"list": [_source_variable(), _job_variable()]},
        "panels": _placed(dashboard.panels),
    }  # fmt: skip


def _source_variable() -> dict[str, Any]:
    return {
        "name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "hide": 0,
        "current": {}, "options": [], "refresh": 1, "regex": "", "multi": False, "includeAll": False,
        "skipUrlSync": False,
    }  # fmt: skip


def _job_variable() -> dict[str, Any]:
    query = "label_values(fedmq_job_version, exported_job)"
    return {
        "name": "job", "label": "Job", "type": "query", "datasource": SOURCE, "definition": query,
        "query": {"query": query, "refId": "job"}, "refresh": 2, "regex": "", "sort": 1, "hide": 0, "multi": False,
        "includeAll": False, "current": {}, "options": [], "skipUrlSync": False,
    }  # fmt: skip


def _placed(panels: Sequence[Panel]) -> list[dict[str, Any]]:
    """Lay the panels out and number them."""
    placed, x, y, row_height = [], 0, 0, 0
    for number, panel in enumerate(panels, 1):
        width = COLUMNS if panel.kind == "row" else panel.width
        if x + width > COLUMNS:
            x, y, row_height = 0, y + row_height, 0
        height = 1 if panel.kind == "row" else panel.height
        place = {"x": x, "y": y, "w": width, "h": height}
        placed.append({"id": number, "gridPos": place} | _panel(panel))
        x, row_height = x + width, max(row_height, height)
    return placed


def _panel(panel: Panel) -> dict[str, Any]:
    if panel.kind == "row":
        return {"type": "row", "title": panel.title, "collapsed": False, "panels": []}
    return {
        "type": panel.kind, "title": panel.title, "description": panel.text, "datasource": SOURCE,
        "targets": [_target(panel, query, index) for index, query in enumerate(panel.queries)],
        "fieldConfig": {"defaults": _defaults(panel), "overrides": _overrides(panel)},
        "options": _options(panel), "transformations": _transformations(panel),
    }  # fmt: skip


def _target(panel: Panel, query: Query, index: int) -> dict[str, Any]:
    instant = panel.kind in ("bargauge", "table")
    kind = {"heatmap": "heatmap", "table": "table"}.get(panel.kind, "time_series")
    return {
        "refId": chr(ord("A") + index), "datasource": SOURCE, "editorMode": "code", "expr": query.expression,
        "legendFormat": query.legend or "__auto", "format": kind, "instant": instant, "range": not instant,
    }  # fmt: skip


def _defaults(panel: Panel) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "unit": panel.unit, "noValue": panel.none,
        "color": {"mode": "palette-classic" if panel.kind == "timeseries" else "thresholds"},
        "thresholds": {"mode": "absolute", "steps": [{"value": v, "color": c} for v, c in panel.steps]},
        "mappings": [
            {"type": "value", "options": {str(v): {"text": t, "color": c, "index": i}}}
            for i, (v, (t, c)) in enumerate(panel.words.items())
        ],
    }  # fmt: skip
    if panel.low is not None:
        defaults["min"] = panel.low
    if panel.high is not None:
        defaults["max"] = panel.high
    if panel.decimals is not None:
        defaults["decimals"] = panel.decimals
    if panel.kind == "timeseries":
        defaults["custom"] = {
            "drawStyle": "line", "lineWidth": 2, "fillOpacity": 40 if panel.stack else 8, "showPoints": "never",
            "spanNulls": 60_000, "lineInterpolation": "linear", "axisPlacement": "auto", "gradientMode": "none",
            "stacking": {"mode": "normal" if panel.stack else "none", "group": "A"},
            "thresholdsStyle": {"mode": "dashed" if panel.line else "off"},
            "scaleDistribution": {"type": "log", "log": 10} if panel.log else {"type": "linear"},
        }  # fmt: skip
    if panel.kind == "state-timeline":
        defaults["custom"] = {"fillOpacity": 80, "lineWidth": 0}
    return defaults


def _overrides(panel: Panel) -> list[dict[str, Any]]:
    overrides = []
    for index, query in enumerate(panel.queries):
        properties: list[dict[str, Any]] = []
        if query.right:
            properties += [{"id": "custom.axisPlacement", "value": "right"}, {"id": "unit", "value": query.right}]
            properties += [{"id": "max", "value": None}, {"id": "custom.stacking", "value": {"mode": "none"}}]
        if query.color:
            properties.append({"id": "color", "value": {"mode": "fixed", "fixedColor": query.color}})
        if properties:
            matcher = {"id": "byFrameRefID", "options": chr(ord("A") + index)}
            overrides.append({"matcher": matcher, "properties": properties})
    return overrides


def _options(panel: Panel) -> dict[str, Any]:
    last = {"calcs": ["lastNotNull"], "fields": "", "values": False}
    if panel.kind == "stat":
        return {
            "reduceOptions": last, "colorMode": "value", "graphMode": "area", "textMode": "auto",
            "justifyMode": "auto", "orientation": "auto",
        }  # fmt: skip
    if panel.kind == "bargauge":
        return {"reduceOptions": last, "displayMode": "basic", "orientation": "horizontal", "showUnfilled": True}
    if panel.kind == "heatmap":
        return {
            "calculate": False, "cellGap": 1, "yAxis": {"unit": panel.unit, "axisPlacement": "left"},
            "color": {"mode": "scheme", "scheme": "Turbo", "steps": 64, "fill": "dark-blue", "exponent": 0.5},
            "filterValues": {"le": 1e-9}, "legend": {"show": True}, "tooltip": {"mode": "single", "yHistogram": True},
            "rowsFrame": {"layout": "auto"}, "showValue": "never",
        }  # fmt: skip
    if panel.kind == "table":
        return {"showHeader": True, "cellHeight": "sm"}
    if panel.kind == "state-timeline":
        return {"mergeValues": True, "showValue": "auto", "rowHeight": 0.8, "legend": {"showLegend": False}}
    return {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }


def _transformations(panel: Panel) -> list[dict[str, Any]]:
    if panel.kind != "table":
        return []
    hidden = dict.fromkeys(("Time", "Value", "__name__", "alertstate", "job", "vhost"), True)
    return [
        {
            "id": "organize",
            "options": {"excludeByName": hidden, "renameByName": {"alertname": "alert", "exported_job": "FedMQ job"}},
        }
    ]
