#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Write the documents that are made from declarations in the code.

docs/knobs.md and docs/profiles.md from the catalogue, docs/metrics.md from the
collectors, docs/doctor.md from the rules of the doctor,
docs/man/ (man_pages.py) and completions/ (shell_completions.py) from the table
of verbs, and the output of commands shown in README.md from the commands
themselves.  ``--check`` writes nothing and exits 1 where one is out of date
(tests/unit/test_house.py runs it).
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

import man_pages
import shell_completions
from infertune.base.tables import Key
from infertune.catalogue.knobs import KNOBS
from infertune.catalogue.knobs.base import Knob
from infertune.catalogue.knobs.guards import GUARDS
from infertune.catalogue.launch_settings import ENVIRONMENT_ALLOWED, LAUNCH_SETTINGS
from infertune.catalogue.server_settings import SERVER_SETTINGS, ServerSetting
from infertune.cli.main import main as infertune
from infertune.doctor.rules import SUBJECTS
from infertune.exporter import declarations
from infertune.exporter.base import Metric
from infertune.exporter.collectors import COLLECTORS
from infertune.exporter.energy import ENERGY_METRICS
from infertune.exporter.page import EXPORTER_METRICS, RUNNER_METRICS
from infertune.exporter.probes import PROBE_METRICS, package_directories
from infertune.profiles.config import CONFIG_KEYS
from infertune.servers.declaration import KEYS

REPOSITORY = Path(__file__).resolve().parent.parent

# -- docs/knobs.md -------------------------------------------------------------


def knobs_page() -> str:
    """The catalogue as one table per family, and the guards."""
    out = [
        "# Knobs",
        "",
        "Made from `daemon/infertune/catalogue/knobs/` by `scripts/generate_docs.py`; do not edit.",
        "",
        "A profile names a knob by its id. *Evidence* is what is known about its effect on",
        "inference: `measured`, `reported` (by others), `protective, unmeasured` or",
        "`no effect found`. Risk *power* may change heat, noise or stability under load; *boot*",
        "takes effect at the next boot and is never written live. A guard refuses a value on",
        "machines where it has done harm (end of this page).",
    ]
    for family in dict.fromkeys(knob.family for knob in KNOBS.values()):
        out += ["", f"## {family}", ""]
        for knob in KNOBS.values():
            if knob.family == family:
                out += _knob(knob)
    out += [
        "",
        "## Guards",
        "",
        "| knob | refused | where | why | source |",
        "|---|---|---|---|---|",
    ]
    for guard in GUARDS:
        where = [
            f"product `{guard.product}`" if guard.product else "",
            f"GPU `{guard.gpu}`" if guard.gpu else "",
            f"Linux before {'.'.join(map(str, guard.kernel_before))}"
            if guard.kernel_before
            else "",
        ]
        cells = (
            f"`{guard.knob}`",
            ", ".join(f"`{value}`" for value in guard.values),
            ", ".join(filter(None, where)),
            guard.reason,
            guard.source,
        )
        out.append(_row(cells))
    return "\n".join(out) + "\n"


def _knob(knob: Knob) -> list[str]:
    facts = [
        ("file", ", ".join(f"`{path}`" for path in knob.paths)),
        ("accepts", knob.value.accepts()),
        ("evidence", f"{knob.evidence.label}: {knob.evidence.text} ({knob.evidence.source})"),
        ("where absent", knob.absent),
        ("defined in", knob.doc),
    ]
    if knob.risk != "safe":
        facts.append(("risk", knob.risk))
    if knob.while_open:
        facts.append(("lasts", "only while a process holds it (`infertune run`)"))
    for label, ids in (
        ("set after", knob.after),
        ("restored after", knob.restore_after),
        ("may also change", knob.touches),
    ):
        if ids:
            facts.append((label, ", ".join(f"`{each}`" for each in ids)))
    lines = [f"### {knob.id}", "", knob.summary, ""]
    return [*lines, *(f"- {label}: {text}" for label, text in facts), ""]


def _version(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


# -- docs/profiles.md ----------------------------------------------------------


def profiles_page() -> str:
    """What a profile may say beside knobs, and the other files that people write."""
    out = [
        "# Profiles",
        "",
        "Made from the catalogue by `scripts/generate_docs.py`; do not edit.",
        "",
        "A profile is a TOML file. `[now]` and `[boot]` hold [knobs](knobs.md), `[launch]` says",
        "how the server process is placed, `[server]` holds llama-server's own settings. A setting",
        'is a value, or `{ value = ..., required = true, because = "why" }`.',
        "`[backend.rocm.server]` and the like hold for one backend. `infertune profile check`",
        "says what is wrong with a file, `infertune profile explain` what a profile comes to here.",
        "",
        "## Sizes",
        "",
        "| written | is |",
        "|---|---|",
        "| `512MiB`, `96GiB`, `64GB` | so much |",
        "| `10%` | a share of what the system has of memory (`MemTotal`) |",
        "| `4GiB, at most 10%` | the smaller of the two |",
        "| `96GiB, at least 75%, at most 80%` | 96 GiB between the two, else the nearer of them |",
        "",
        "## [launch]",
        "",
        "| setting | accepts | what | evidence |",
        "|---|---|---|---|",
    ]
    for launch in LAUNCH_SETTINGS.values():
        evidence = f"{launch.evidence.label}: {launch.evidence.text}"
        out.append(_row((f"`{launch.id}`", launch.value.accepts(), launch.summary, evidence)))
    out += ["", "## [launch.env]", "", "| variable | what |", "|---|---|"]
    out += [_row((f"`{rule.pattern}`", rule.why)) for rule in ENVIRONMENT_ALLOWED]
    out += [
        "",
        "## [server]",
        "",
        "The same settings may follow `infertune serve ... --` and `infertune fit ... --`, and",
        "stand under `[settings]` of a declared server. The first of the flags that the binary at",
        "hand knows is used; a setting it does not know is refused, with the reason.",
        "",
        "| setting | accepts | what | flags, newest first |",
        "|---|---|---|---|",
    ]
    for server in SERVER_SETTINGS.values():
        flags = ", ".join(f"`{flag}`" for flag in _flags(server)) or "none: infertune does it"
        out.append(_row((f"`{server.id}`", server.value.accepts(), server.summary, flags)))
    out += [
        "",
        "## /etc/infertune/servers.d/NAME.toml",
        "",
        "A server that starts at boot, or whose unit is under a profile whenever it runs. With",
        "`unit` it is a unit of your own ([your server](your-server.md)), with `exec` any command",
        "in a unit of infertune's, else llama-server. The file and its directories belong to root,",
        "and nobody else may write them.",
        "",
        *_keys(KEYS),
        "",
        "## /etc/infertune/infertuned.toml",
        "",
        "What the daemon is told; it is read when the daemon starts. A missing file is all",
        "defaults; one that cannot be read is an error, and nothing is applied.",
        "",
        *_keys(CONFIG_KEYS),
    ]
    return "\n".join(out) + "\n"


def _keys(keys: Sequence[Key]) -> list[str]:
    """The keys of a file; with the kinds of table that may have each, where it has several."""
    kinds = any(key.kinds for key in keys)
    head = ["key", "accepts", "what", "without it", *(["goes with"] if kinds else [])]
    lines = [_row(head), "|" + "---|" * len(head)]
    for key in keys:
        cells = [f"`{key.name}`", key.accepts, key.what, key.default]
        lines.append(_row([*cells, *([", ".join(key.kinds)] if kinds else [])]))
    return lines


def _flags(setting: ServerSetting) -> list[str]:
    """The flags of a setting, each once."""
    ways = [
        (way,) if isinstance(way, str) else (flag for flags in way.values() for flag in flags)
        for way in setting.ways
    ]
    return list(dict.fromkeys(flag for way in ways for flag in way))


# -- docs/metrics.md -----------------------------------------------------------


def metrics_page() -> str:
    """Every metric of the exporter, by collector."""
    out = [
        "# Metrics",
        "",
        "Made from `daemon/infertune/exporter/` by `scripts/generate_docs.py`; do not edit.",
        "",
        "What `infertune-exporter` serves on `127.0.0.1:9877/metrics`. A value that is not known",
        "is left out, never zero; a collector whose hardware is absent has no samples and",
        '`infertune_collector_state{state="absent"}`. `server` is the name of a declared server or',
        "of its unit, and empty for everything else; no label is a process id or a path. *Series*",
        "is the bound of their number. `?collect[]=amdgpu&collect[]=kfd` asks for some only.",
    ]
    for collector in COLLECTORS.values():
        out += ["", f"## {collector.id}", "", collector.summary]
        if collector.max_age_s > 1:
            out.append(f"Read every {collector.max_age_s:g} s at most.")
        out += _metrics(collector.metrics)
    out += ["", "## Probes", "", "Counted by eBPF programs in the kernel; see `probes/`."]
    for probe in declarations.load(package_directories()[0]):
        help_text = textwrap.wrap(probe.help, 100, break_on_hyphens=False)
        out += ["", f"### {probe.title}", "", *help_text]
        out += _metrics(counted.metric for counted in probe.counted)
    out += ["", "### The probes themselves", *_metrics(PROBE_METRICS)]
    out += ["", "## energy", "", "Energy of the processor.", *_metrics(ENERGY_METRICS)]
    out += ["", "## The exporter itself", "", "Beside these the page has `process_*`."]
    return "\n".join([*out, *_metrics((*RUNNER_METRICS, *EXPORTER_METRICS))]) + "\n"


def _metrics(metrics: Iterable[Metric]) -> list[str]:
    lines = ["", "| metric | type | unit | labels | meaning | series | source |"]
    lines.append("|---|---|---|---|---|---|---|")
    for metric in metrics:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        cells = (f"`{metric.name}`", metric.kind, metric.unit, labels)
        lines.append(_row((*cells, metric.help, metric.series, metric.source)))
    return lines


# -- docs/doctor.md ------------------------------------------------------------


def doctor_page() -> str:
    """Every rule of the doctor, by subject."""
    out = [
        "# Doctor",
        "",
        "Made from `daemon/infertune/doctor/rules/` by `scripts/generate_docs.py`; do not edit.",
        "",
        "What `infertune doctor` looks for. An *error* must be fixed before results or the machine",
        "can be trusted, and makes the exit code 1; a *warning* costs speed, memory or stability;",
        "*info* is worth knowing. *Sure* is what a source says of exactly this case, everything",
        "else is *likely*; a finding may be less severe or less sure than its rule. What cannot be",
        "read is *not known*, with the reason. Versions: between the last one reported bad and the",
        "first one known to be good nobody has said, and the finding says *may*. *About*: nobody",
        "has named the first good one; the number is of a build after the fix by its date.",
        "Findings with one cause are reported as one, with the worst severity among them.",
    ]
    for subject, rules in SUBJECTS.items():
        out += ["", f"## {subject}", "", "| rule | looks for | where | how bad | fix | source |"]
        out.append("|---|---|---|---|---|---|")
        for rule in rules:
            versions = f" ({rule.window})" if rule.window else ""
            sources = ", ".join(f"[{each.text}]({each.url})" for each in rule.sources)
            kind = "advice" if subject == "survey" else f"{rule.severity}, {rule.confidence}"
            cells = (f"`{rule.id}`", rule.title + versions, rule.when.words, kind, rule.fix)
            out.append(_row((*cells, sources)))
    return "\n".join(out) + "\n"


# -- README.md -----------------------------------------------------------------


def readme() -> str:
    """README.md with the output of each ``$ infertune ...`` block as it is today."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    return re.sub(
        r"(?<=^```console\n)\$ infertune (.*)\n(?:(?!```).*\n)*", _console, text, flags=re.M
    )


def _console(block: re.Match[str]) -> str:
    os.environ["COLUMNS"] = "80"  # as on a terminal
    with contextlib.redirect_stdout(io.StringIO()) as output:
        infertune(block[1].split())
    return f"$ infertune {block[1]}\n{output.getvalue()}"


# -- all of it -----------------------------------------------------------------


def documents() -> dict[Path, str]:
    """Every generated file and what it should hold."""
    shells = shell_completions.pages()
    return {
        Path("docs/knobs.md"): knobs_page(),
        Path("docs/profiles.md"): profiles_page(),
        Path("docs/metrics.md"): metrics_page(),
        Path("docs/doctor.md"): doctor_page(),
        **{Path("docs/man") / name: text for name, text in man_pages.pages().items()},
        Path("README.md"): readme(),
        **{Path(f"completions/infertune.{shell}"): text for shell, text in shells.items()},
    }


def main() -> int:
    stale = []
    os.chdir(REPOSITORY)  # README's commands name files as seen from there
    for path, text in documents().items():
        target = REPOSITORY / path
        if target.exists() and target.read_text(encoding="utf-8") == text:
            continue
        stale.append(str(path))
        if "--check" not in sys.argv[1:]:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
    if stale:
        print("out of date:" if "--check" in sys.argv[1:] else "written:", ", ".join(stale))
    return 1 if stale and "--check" in sys.argv[1:] else 0


if __name__ == "__main__":
    sys.exit(main())
