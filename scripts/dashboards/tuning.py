# SPDX-License-Identifier: Apache-2.0
"""What was asked for, what is, who changed it; and whether infertune itself is well."""

from dashboards.base import (
    BLUE,
    GREEN,
    GREY,
    INSTANCE,
    RED,
    YELLOW,
    Dashboard,
    Panel,
    Row,
    Target,
    per_second,
)

_I = 'instance=~"$instance"'

TUNING = Dashboard(
    uid="infertune-tuning",
    title="infertune / Tuning",
    description="Desired and live values, owners and drift; journals, boot settings, probes and "
    "the exporter's own cost.",
    variables=(INSTANCE,),
    rows=(
        Row(
            "Profile",
            (
                Panel(
                    title="Applied profile",
                    description="And the backend it was resolved for. None: everything is as the "
                    "system has it.",
                    unit="none",
                    width=6,
                    height=6,
                    kind="table",
                    nothing="no profile is applied",
                    columns={"instance": "Machine", "profile": "Profile", "backend": "Backend"},
                    targets=(Target(f"infertune_profile_info{{{_I}}}"),),
                ),
                Panel(
                    title="Applied since",
                    description="Age of the applied profile.",
                    unit="s",
                    width=6,
                    height=6,
                    kind="stat",
                    nothing="no profile is applied",
                    targets=(
                        Target(
                            f"time() - infertune_profile_applied_timestamp_seconds{{{_I}}}",
                            "{{instance}}",
                        ),
                    ),
                ),
                Panel(
                    title="Waits for a confirmation",
                    description="It goes back by itself unless somebody runs infertune confirm.",
                    unit="none",
                    width=6,
                    height=6,
                    kind="stat",
                    nothing="no profile is applied",
                    words={"0": ("no", GREEN), "1": ("waits", YELLOW)},
                    targets=(Target(f"infertune_profile_unconfirmed{{{_I}}}", "{{instance}}"),),
                ),
                Panel(
                    title="Files that drifted",
                    description="Changed by another program since infertune set them; infertune "
                    "status names it. infertune apply takes them back, infertune revert leaves "
                    "them.",
                    unit="none",
                    width=6,
                    height=6,
                    kind="stat",
                    nothing="no profile is applied",
                    limits=((None, GREEN), (1, RED)),
                    targets=(
                        Target(
                            f"sum by (instance) (infertune_knob_drifted{{{_I}}})", "{{instance}}"
                        ),
                    ),
                ),
            ),
        ),
        Row(
            "Knobs",
            (
                Panel(
                    title="Desired",
                    description="What the applied profile asks for.",
                    unit="none",
                    kind="table",
                    height=12,
                    nothing="no profile is applied",
                    columns={"instance": "Machine", "knob": "Knob", "value": "Desired"},
                    targets=(Target(f"infertune_knob_wanted_info{{{_I}}}"),),
                ),
                Panel(
                    title="Live",
                    description="What each knob holds now, and in how many files.",
                    unit="none",
                    kind="table",
                    height=12,
                    columns={
                        "instance": "Machine",
                        "knob": "Knob",
                        "value": "Holds",
                        "Value": "Files",
                    },
                    targets=(Target(f"infertune_knob_files{{{_I}}}"),),
                ),
                Panel(
                    title="Owner",
                    description="Who set it: the system, infertune, or another program after it.",
                    unit="none",
                    kind="table",
                    height=12,
                    columns={
                        "instance": "Machine",
                        "knob": "Knob",
                        "owner": "Owner",
                        "Value": "Files",
                    },
                    targets=(Target(f"infertune_knob_owner{{{_I}}} > 0"),),
                ),
                Panel(
                    title="Drift",
                    description="Files that are not as infertune set them, by knob. Again and "
                    "again: two tuners pull at one knob (infertune doctor).",
                    unit="none",
                    width=12,
                    nothing="no profile is applied",
                    targets=(Target(f"infertune_knob_drifted{{{_I}}}", "{{instance}} {{knob}}"),),
                ),
                Panel(
                    title="Knobs that are numbers",
                    description="Their values over time.",
                    unit="none",
                    width=12,
                    targets=(
                        Target(
                            f'infertune_knob_value{{{_I},knob=~"vm[.].*"}}',
                            "{{instance}} {{knob}}",
                        ),
                    ),
                ),
            ),
        ),
        Row(
            "Journals and boot settings",
            (
                Panel(
                    title="State",
                    description="As infertune status has it. degraded: a journal was damaged, look "
                    "before anything else. interrupted: infertune recover.",
                    unit="none",
                    kind="state-timeline",
                    words={"1": ("yes", BLUE), "0": (" ", GREY)},
                    targets=(
                        Target(f"infertune_journal_state{{{_I}}} == 1", "{{instance}} {{state}}"),
                    ),
                ),
                Panel(
                    title="Original values kept",
                    description="Files whose original is in the journal; revert puts them back.",
                    unit="none",
                    width=4,
                    kind="stat",
                    targets=(Target(f"infertune_journal_records{{{_I}}}", "{{instance}}"),),
                ),
                Panel(
                    title="Damaged journals",
                    description="Set aside for a person to look at.",
                    unit="none",
                    width=4,
                    kind="stat",
                    limits=((None, GREEN), (1, RED)),
                    targets=(Target(f"infertune_journal_damaged_files{{{_I}}}", "{{instance}}"),),
                ),
                Panel(
                    title="Boot settings",
                    description="How far staged boot settings are. pending-reboot: they are tried "
                    "at the next start. failed: no start was confirmed, they were put back.",
                    unit="none",
                    width=4,
                    kind="table",
                    columns={"instance": "Machine", "state": "State"},
                    targets=(Target(f"infertune_boot_state{{{_I}}} == 1"),),
                ),
                Panel(
                    title="Staged since",
                    description="Age of staged boot settings. A reboot that is put off for days "
                    "is a machine that is not what its profile says.",
                    unit="s",
                    width=4,
                    kind="stat",
                    nothing="nothing is staged",
                    targets=(
                        Target(
                            f"time() - infertune_boot_staged_timestamp_seconds{{{_I}}}",
                            "{{instance}}",
                        ),
                    ),
                ),
            ),
        ),
        Row(
            "Probes and exporter",
            (
                Panel(
                    title="Probes",
                    description="Which are attached, which are not and why: infertune probes.",
                    unit="none",
                    kind="table",
                    width=6,
                    columns={"instance": "Machine", "probe": "Probe", "state": "State"},
                    targets=(Target(f"infertune_probe_state{{{_I}}} == 1"),),
                ),
                Panel(
                    title="Collectors",
                    description="absent: the machine has none of it. timeout, failed: the page / "
                    "of the exporter has the reason.",
                    unit="none",
                    kind="table",
                    width=6,
                    columns={"instance": "Machine", "collector": "Collector", "state": "State"},
                    targets=(Target(f"infertune_collector_state{{{_I}}} == 1"),),
                ),
                Panel(
                    title="What the exporter costs",
                    description="CPU of the exporter, without its BPF programs. Above 10 %: scrape "
                    "less often, or collect[] less.",
                    unit="percentunit",
                    width=6,
                    targets=(
                        Target(
                            per_second(f'process_cpu_seconds_total{{{_I},job="infertune"}}'),
                            "{{instance}}",
                        ),
                    ),
                ),
                Panel(
                    title="Time of a collection",
                    description="How long the last collection took.",
                    unit="s",
                    width=6,
                    targets=(
                        Target(
                            f"infertune_exporter_collection_duration_seconds{{{_I}}}",
                            "{{instance}}",
                        ),
                    ),
                ),
            ),
        ),
    ),
)
