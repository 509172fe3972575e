# SPDX-License-Identifier: Apache-2.0
"""Dashboards and rules: whole, legible, and asking for nothing that no exporter has.

That every query has an answer is shown by tests/host/test_dashboards.py.
"""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys

import pytest

from dashboards_of import (
    REPOSITORY,
    Query,
    dashboards,
    declared,
    metrics,
    names,
    panels,
    queries,
    rules,
    selectors,
)

PANELS = [(name, panel) for name, each in dashboards().items() for panel in panels(each)]
ALERTS = [rule for rule in rules() if "alert" in rule]
EXPRESSIONS = [
    *queries(),
    *(Query(rule.get("alert", rule.get("record")), rule["expr"]) for rule in rules()),
]


def test_generated_files_are_current() -> None:
    script = REPOSITORY / "scripts" / "generate_dashboards.py"
    done = subprocess.run([sys.executable, "-B", script, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_identities_are_fixed() -> None:
    assert {name: each["uid"] for name, each in dashboards().items()} == {
        name: f"infertune-{name}" for name in ("machine", "model", "tuning", "fleet")
    }
    for each in dashboards().values():
        rows = [panel for panel in each["panels"] if panel["type"] == "row"]
        numbers = sorted(panel["id"] for panel in (*rows, *panels(each)))
        assert numbers == list(range(1, len(numbers) + 1))


@pytest.mark.parametrize("query", EXPRESSIONS, ids=lambda query: query.where)
def test_only_what_exporters_have_is_asked_for(query: Query) -> None:
    known = declared()
    asked = names(query.expr)
    assert asked
    assert asked <= known.keys()
    for name, labels in selectors(query.expr):
        assert labels <= known[name], name
    reachable = set().union(*(known[name] for name in asked))
    reachable |= set(re.findall(r'label_replace\([^,]*(?:{[^}]*})?, "(\w+)"', query.expr))
    for group in re.findall(r"(?:by|on|group_left) \(([^)]*)\)", query.expr):
        assert set(filter(None, re.split(r",\s*", group))) <= reachable
    assert query.labels <= reachable


@pytest.mark.parametrize(
    "panel", [panel for _, panel in PANELS], ids=[f"{n}: {p['title']}" for n, p in PANELS]
)
def test_a_panel_says_what_it_shows(panel: dict[str, object]) -> None:
    assert len(str(panel["description"])) > 20
    assert str(panel["description"]).endswith(".")
    defaults = panel["fieldConfig"]["defaults"]  # type: ignore[index]
    assert defaults["unit"]
    assert defaults["noValue"]


@pytest.mark.parametrize("name", dashboards())
def test_panels_do_not_overlap(name: str) -> None:
    everything = dashboards()[name]["panels"]
    closed = [row["panels"] for row in everything if row["type"] == "row" and row["collapsed"]]
    for together in (everything, *closed):
        places = [panel["gridPos"] for panel in together]
        for one, other in itertools.combinations(places, 2):
            beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
            below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
            assert beside or below, (one, other)
        assert all(place["x"] + place["w"] <= 24 for place in places)


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_an_alert_has_a_page(alert: dict[str, dict[str, str]]) -> None:
    assert alert["labels"]["severity"] in ("info", "warning", "critical")
    page = (REPOSITORY / alert["annotations"]["runbook"]).read_text()
    assert page.startswith(f"# {alert['alert']}\n")
    assert re.findall(r"^## (.*)$", page, re.MULTILINE) == ["What it means", "Look", "Do"]


def test_a_page_has_an_alert() -> None:
    pages = {path.stem for path in (REPOSITORY / "docs" / "runbooks").iterdir()}
    assert pages == {alert["alert"] for alert in ALERTS}


def test_each_alert_fires_and_stays_silent() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    cases = REPOSITORY / "prometheus" / "tests" / "infertune-alerts.yml"
    text = cases.read_text()
    for alert in ALERTS:
        for what in ("fires", "stays silent"):
            assert f"- name: {alert['alert']} {what}\n" in text
    for words in (("check", "rules", *RULE_FILES), ("test", "rules", cases)):
        done = subprocess.run([promtool, *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


ASKED_BY_HAND = {
    "infertune_gpu_info": "joins a card's name to its PCI address",
    "infertune_kfd_node_info": "joins a card's name to its architecture",
    "infertune_npu_info": "joins an NPU's name to its firmware",
    "infertune_gpu_pool_limit_bytes": "which setting it is that limits the pool",
    "infertune_gpu_pool_promised_bytes": "why a server has to wait for memory",
    "infertune_journal_earlier_boot": "whether a boot ended without warning",
    "infertune_direct_reclaimed_bytes_total": "what the time in direct reclaim was for",
    "infertune_drm_scheduler_jobs_in_flight": "whether a ring hangs",
    "infertune_collector_duration_seconds": "what the page costs",
    "infertune_collector_left_out": "whether the page is cut",
    "infertune_exporter_collections_total": "how often the machine is read",
    "infertune_exporter_threads": "whether a read hangs",
    "infertune_probe_lost_total": "whether counts can be trusted",
    "infertune_probe_runs_total": "what a probe costs, while somebody measures it",
    "infertune_probe_run_seconds_total": "what a probe costs, while somebody measures it",
}
"""What no rule and no panel asks for, and the question it answers."""


def test_what_nobody_asks_for_is_not_on_the_page() -> None:
    """A series costs its reading, its line and its place in Prometheus, at each scrape."""
    asked = {name for query in queries() for name in names(query.expr)}
    asked |= {name for rule in rules() for name in names(rule["expr"])}
    ends = ("_bucket", "_sum", "_count")
    asked |= {name.removesuffix(end) for name in asked for end in ends}
    # What an engine says of its models is its own, and passed on.
    ours = {
        name
        for name in (metric.name for metric in metrics())
        if not name.startswith("infertune_model_")
    }
    assert ours - asked == set(ASKED_BY_HAND)


RULE_FILES = sorted((REPOSITORY / "prometheus" / "rules").glob("*.yml"))


def test_the_stacked_memory_is_no_more_than_is_built_in() -> None:
    """On the machine of the picture; its parts, not one of them held at 0."""
    [panel] = [each for _, each in PANELS if each["title"] == "Memory"]
    assert not [target for target in panel["targets"] if "clamp" in target["expr"]]
    page = (REPOSITORY / "tests/golden/strix-halo-128-serving.metrics").read_text()

    def value(sample: str) -> float:
        return float(re.search(rf"^infertune_{re.escape(sample)} (.*)$", page, re.M)[1])  # type: ignore[index]

    total, available = (value(f'memory_bytes{{kind="{kind}"}}') for kind in ("total", "available"))
    gtt = value('gpu_memory_used_bytes{gpu="card1",pool="gtt"}')
    carve_out = value('gpu_memory_bytes{gpu="card1",pool="vram"}')
    cpu_side = total - available - gtt
    assert carve_out + gtt + max(cpu_side, 0) + available <= total + carve_out
    # What the servers cannot give back is on the CPU side.
    unit = 'part="anon",server="",unit="infertune.slice"'
    assert 0 < value(f"unit_memory_part_bytes{{{unit}}}") <= cpu_side


def test_what_is_seen_first_fits_two_screens() -> None:
    """The rest is a click away, and asks nothing until then."""
    for name, each in dashboards().items():
        seen = [panel for panel in each["panels"] if panel["type"] != "row"]
        assert len(seen) <= 12, name
        first, *others = (panel for panel in each["panels"] if panel["type"] == "row")
        assert first["title"] == "At a glance"
        assert [row["collapsed"] for row in others] == sorted(row["collapsed"] for row in others)
        summaries = [panel for panel in seen if panel["gridPos"]["y"] == 1]
        assert [panel["type"] for panel in summaries] == ["stat"] * 6
