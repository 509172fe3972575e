# SPDX-License-Identifier: Apache-2.0
"""What tests need to know of the dashboards and rules of this repository."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from infertune.exporter.base import Metric
from infertune.exporter.collectors import COLLECTORS
from infertune.exporter.energy import ENERGY_METRICS
from infertune.exporter.page import EXPORTER_METRICS, RUNNER_METRICS
from infertune.exporter.probes import metrics as probe_metrics

REPOSITORY = Path(__file__).resolve().parents[1]
RULES = REPOSITORY / "prometheus" / "rules"
ADDED = {"instance", "job"}
"""Labels that Prometheus adds to each series."""


@dataclass(frozen=True, slots=True)
class Query:
    """One query, and what its answer must have."""

    where: str
    expr: str
    labels: frozenset[str] = frozenset()

    def filled(self, interval: str = "10s", instance: str = ".*") -> str:
        """With the variables as they are when everything, or one machine, is chosen."""
        text = self.expr.replace("$__rate_interval", interval)
        return text.replace("$instance", instance).replace("$server", ".*")


def dashboards() -> dict[str, dict[str, Any]]:
    found = sorted((REPOSITORY / "grafana" / "dashboards").glob("*.json"))
    return {path.stem: json.loads(path.read_text()) for path in found}


def panels(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """All of them, those of closed rows too."""
    for each in dashboard["panels"]:
        yield from each["panels"] if each["type"] == "row" else [each]


def queries() -> Iterator[Query]:
    """Every target of every panel, every variable and every annotation."""
    for name, dashboard in dashboards().items():
        for panel in panels(dashboard):
            columns = {
                label
                for step in panel["transformations"]
                if step["id"] == "filterFieldsByName"
                for label in step["options"]["include"]["names"]
            }
            for target in panel["targets"]:
                legend = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
                labels = frozenset(legend | columns) - {"Value"}
                yield Query(f"{name}: {panel['title']}", target["expr"], labels)
        for variable in dashboard["templating"]["list"]:
            if match := re.fullmatch(
                r"label_values\((.*), (\w+)\)", variable.get("definition", "")
            ):
                where = f"{name}: variable {variable['name']}"
                yield Query(where, match[1], frozenset({match[2]}))
        for annotation in dashboard["annotations"]["list"]:
            yield Query(f"{name}: {annotation['name']}", annotation["expr"], frozenset({"profile"}))


def rules() -> Iterator[dict[str, Any]]:
    for path in sorted(RULES.glob("*.yml")):
        for group in yaml.safe_load(path.read_text())["groups"]:
            yield from group["rules"]


def operand(expr: str) -> str:
    """What an alert compares: there must be data for it also while it is silent."""
    return re.sub(r"\s*(==|<|>)[\d\s.*]+$", "", expr.strip())


def metrics() -> Iterator[Metric]:
    """Every metric that an exporter can have."""
    for collector in COLLECTORS.values():
        yield from collector.metrics
    yield from (*RUNNER_METRICS, *EXPORTER_METRICS, *probe_metrics(), *ENERGY_METRICS)


@functools.cache
def declared() -> dict[str, set[str]]:
    """Labels by name of each series that an exporter can have, and of what rules record."""
    found: dict[str, set[str]] = {"up": ADDED, "ALERTS": {"alertname", "alertstate", "instance"}}
    for metric in metrics():
        labels = {*metric.labels, *ADDED}
        ends = ("_sum", "_count") if metric.kind == "histogram" else ("",)
        found.update({metric.name + end: labels for end in ends})
        if metric.kind == "histogram":
            found[f"{metric.name}_bucket"] = labels | {"le"}
    for name in ("process_cpu_seconds_total", "process_resident_memory_bytes"):
        found[name] = ADDED
    for rule in rules():
        if "record" in rule:
            used = (found[name] for name in names(rule["expr"]))
            found[rule["record"]] = set().union(*used) - {"le"}
    return found


NAME = r"(?:infertune|process)_\w+|\w+:[\w:]+|\bup\b|\bALERTS\b"


def names(expr: str) -> set[str]:
    """Series that an expression asks for."""
    return set(re.findall(NAME, re.sub(r'"[^"]*"', '""', expr)))


def selectors(expr: str) -> Iterator[tuple[str, set[str]]]:
    """Each series with the labels that it is chosen by."""
    for name, inside in re.findall(rf"({NAME}){{([^}}]*)}}", expr):
        yield name, set(re.findall(r'(\w+)(?:=|!=|=~|!~)"', inside))
