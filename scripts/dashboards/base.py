# SPDX-License-Identifier: Apache-2.0
"""What a dashboard is, and its JSON as Grafana provisions it from a file (schema 39, Grafana 11).

https://grafana.com/docs/grafana/latest/dashboards/build-dashboards/view-dashboard-json-model/
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Kind = Literal["timeseries", "stat", "table", "state-timeline"]
COLUMNS = 24
"""Width of Grafana's grid."""
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}

RED, YELLOW, GREEN, BLUE, GREY = "red", "yellow", "green", "blue", "text"


@dataclass(frozen=True, slots=True)
class Target:
    """One query.  ``legend`` names labels in double braces."""

    expr: str
    legend: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One picture of one question."""

    title: str
    description: str
    """What it shows, and what to do about it."""
    targets: tuple[Target, ...]
    unit: str
    """Grafana's name of the unit: ``bytes``, ``s``, ``percentunit``, ``none`` for a plain count."""
    kind: Kind = "timeseries"
    width: int = 8
    height: int = 8
    stack: bool = False
    words: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Value to text and colour."""
    limits: tuple[tuple[float | None, str], ...] = ((None, GREEN),)
    """From which value on which colour; the first has none."""
    nothing: str = "no data"
    """What an empty answer means."""
    columns: dict[str, str] = field(default_factory=dict)
    """Of a table: label to heading, in order; all others are hidden."""
    named: bool = False
    """Of a stat: the legend is the answer, and its value says nothing."""


@dataclass(frozen=True, slots=True)
class Row:
    title: str
    panels: tuple[Panel, ...]
    closed: bool = False
    """Opened by whoever looks for a cause; until then Grafana asks none of its queries."""


@dataclass(frozen=True, slots=True)
class Variable:
    """Values to choose from."""

    name: str
    label: str
    query: str
    many: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Dashboard:
    uid: str
    title: str
    description: str
    variables: tuple[Variable, ...]
    rows: tuple[Row, ...]


INSTANCE = Variable("instance", "Machine", "label_values(infertune_exporter_info, instance)")
ONE_INSTANCE = replace(INSTANCE, many=False)
SERVER = Variable(
    "server", "Server", 'label_values(infertune_server_state{instance=~"$instance"}, server)'
)


def per_second(selector: str) -> str:
    return f"rate({selector}[$__rate_interval])"


def summary(**stat: Any) -> Panel:
    """One of the figures at the top, which say whether all is well."""
    return Panel(**{"unit": "none", **stat}, kind="stat", width=4, height=4)


def quantile(q: float, metric: str, selector: str, by: str) -> str:
    """Quantile of a histogram over the groups that ``by`` names."""
    rate = per_second(f"{metric}_bucket{{{selector}}}")
    return f"histogram_quantile({q}, sum by ({by}, le) ({rate}))"


def render(dashboard: Dashboard) -> dict[str, Any]:
    """The dashboard as Grafana reads it."""
    return {
        "annotations": {"list": [_annotation()]},
        "description": dashboard.description,
        "editable": True,
        "graphTooltip": 1,  # the crosshair is in all panels at once
        "links": [
            {
                "asDropdown": True,
                "includeVars": True,
                "keepTime": True,
                "tags": ["infertune"],
                "title": "infertune",
                "type": "dashboards",
            }
        ],
        "panels": list(_layout(dashboard.rows)),
        "refresh": "10s",
        "schemaVersion": 39,
        "tags": ["infertune"],
        "templating": {"list": [_datasource(), *map(_variable, dashboard.variables)]},
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "title": dashboard.title,
        "uid": dashboard.uid,
        "version": 1,
    }


def _annotation() -> dict[str, Any]:
    """A line wherever a profile was applied."""
    return {
        "datasource": DATASOURCE,
        "enable": True,
        "expr": 'infertune_profile_applied_timestamp_seconds{instance=~"$instance"} * 1000 '
        "* on (instance) group_left (profile) infertune_profile_info",
        "iconColor": BLUE,
        "name": "profile applied",
        "step": "60s",
        "tagKeys": "instance",
        "textFormat": "{{profile}}",
        "titleFormat": "profile applied",
        "useValueForTime": "on",
    }


def _datasource() -> dict[str, Any]:
    return {
        "label": "Prometheus",
        "name": "datasource",
        "query": "prometheus",
        "refresh": 1,
        "type": "datasource",
    }


def _variable(variable: Variable) -> dict[str, Any]:
    everything = {
        "allValue": ".*",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    }
    return {
        **(everything if variable.many else {}),
        "datasource": DATASOURCE,
        "definition": variable.query,
        "includeAll": variable.many,
        "label": variable.label,
        "multi": variable.many,
        "name": variable.name,
        "query": {"query": variable.query, "refId": variable.name},
        "refresh": 2,
        "sort": 1,
        "type": "query",
    }


def _layout(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Panels from left to right, rows from top to bottom."""
    number, top = 1, 0
    for row in rows:
        header = {
            "collapsed": row.closed,
            "gridPos": {"h": 1, "w": COLUMNS, "x": 0, "y": top},
            "id": number,
            "panels": [],
            "title": row.title,
            "type": "row",
        }
        number, top = number + 1, top + 1
        panels = []
        filled = [top] * COLUMNS
        for panel in row.panels:
            # The highest place where it fits, and there the leftmost.
            y, x = min(
                (max(filled[x : x + panel.width]), x) for x in range(COLUMNS - panel.width + 1)
            )
            filled[x : x + panel.width] = [y + panel.height] * panel.width
            panels.append(
                _panel(panel, number, {"h": panel.height, "w": panel.width, "x": x, "y": y})
            )
            number += 1
        # What a closed row has is in it, and takes no room.
        yield {**header, "panels": panels if row.closed else []}
        if not row.closed:
            yield from panels
            top = max(filled)


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    now = panel.kind in ("stat", "table")
    defaults: dict[str, Any] = {
        "color": {"mode": "palette-classic" if panel.kind == "timeseries" else "thresholds"},
        "mappings": _mappings(panel.words),
        "noValue": panel.nothing,
        "thresholds": {
            "mode": "absolute",
            "steps": [{"color": color, "value": value} for value, color in panel.limits],
        },
        "unit": panel.unit,
    }
    if panel.kind == "timeseries":
        defaults["min"] = 0
        defaults["custom"] = {
            "fillOpacity": 60 if panel.stack else 8,
            "lineWidth": 1,
            "showPoints": "never",
            "stacking": {"mode": "normal" if panel.stack else "none", "group": "A"},
        }
    return {
        "datasource": DATASOURCE,
        "description": panel.description,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "gridPos": place,
        "id": number,
        "options": _options(panel),
        "targets": [
            {
                "datasource": DATASOURCE,
                "expr": target.expr,
                "format": "table" if panel.kind == "table" else "time_series",
                "instant": now,
                "legendFormat": target.legend or "__auto",
                "range": not now,
                "refId": chr(ord("A") + at),
            }
            for at, target in enumerate(panel.targets)
        ],
        "title": panel.title,
        "transformations": _columns(panel),
        "type": panel.kind,
    }


def _mappings(words: dict[str, tuple[str, str]]) -> list[dict[str, Any]]:
    if not words:
        return []
    options = {
        value: {"color": color, "index": at, "text": text}
        for at, (value, (text, color)) in enumerate(words.items())
    }
    return [{"options": options, "type": "value"}]


def _options(panel: Panel) -> dict[str, Any]:
    if panel.kind == "timeseries":
        return {
            "legend": {"calcs": ["lastNotNull", "max"], "displayMode": "table"},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    if panel.kind == "stat":
        return {
            "colorMode": "value",
            "graphMode": "none",
            "reduceOptions": {"calcs": ["lastNotNull"]},
            "textMode": "name" if panel.named else "value_and_name",
        }
    if panel.kind == "state-timeline":
        return {"mergeValues": True, "rowHeight": 0.8, "showValue": "auto"}
    return {"showHeader": True}


def _columns(panel: Panel) -> list[dict[str, Any]]:
    """Only the named columns of a table, in their order, with headings."""
    if not panel.columns:
        return []
    names = {name: at for at, name in enumerate(panel.columns)}
    merge = [{"id": "merge", "options": {}}] if len(panel.targets) > 1 else []
    return [
        *merge,
        {"id": "filterFieldsByName", "options": {"include": {"names": list(names)}}},
        {
            "id": "organize",
            "options": {"indexByName": names, "renameByName": panel.columns},
        },
    ]
