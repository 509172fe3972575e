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
    summary,
)

_I = 'instance=~"$instance"'

# One row for each value that a wanted knob holds; a knob of many files can have several owners, and
# the one of most files is shown.
_KNOBS = (
    f'(label_replace(infertune_knob_files{{{_I}}}, "now", "$1", "value", "(.*)") '
    "* on (instance, knob) group_left (wanted) "
    f'label_replace(infertune_knob_wanted_info{{{_I}}}, "wanted", "$1", "value", "(.*)")) '
    "* on (instance, knob) group_left (owner) "
    f"(topk by (instance, knob) (1, infertune_knob_owner{{{_I}}}) > bool 0)"
)

TUNING = Dashboard(
    uid="infertune-tuning",
    title="infertune / Tuning",
    description="Desired and live values, owners and drift; journals, boot settings, probes and "
    "the exporter's own cost.",
    variables=(INSTANCE,),
    rows=(
        Row(
            "At a glance",
            (
                summary(
                    title="Profile",
                    description="The profile in force, and the backend it was resolved for. "
                    "None: everything is as the system has it.",
                    targets=(
                        Target(
                            f"infertune_profile_info{{{_I}}}",
                            "{{instance}}: {{profile}}, {{backend}}",
                        ),
                    ),
                    named=True,
                    nothing="none",
                ),
                summary(
                    title="Applied since",
                    description="Age of the applied profile.",
                    unit="s",
                    nothing="no profile is applied",
                    targets=(
                        Target(
                            f"time() - infertune_profile_applied_timestamp_seconds{{{_I}}}",
                            "{{instance}}",
                        ),
                    ),
                ),
                summary(
                    title="Unconfirmed",
                    description="1: it goes back by itself unless confirmed (infertune confirm).",
                    nothing="no profile is applied",
                    words={"0": ("no", GREEN), "1": ("waits", YELLOW)},
                    targets=(Target(f"infertune_profile_unconfirmed{{{_I}}}", "{{instance}}"),),
                ),
                summary(
                    title="Files that drifted",
                    description="Changed by another program since infertune set them; infertune "
                    "status names it. infertune apply takes them back, infertune revert leaves "
                    "them.",
                    nothing="no profile is applied",
                    limits=((None, GREEN), (1, RED)),
                    targets=(
                        Target(
                            f"sum by (instance) (infertune_knob_drifted{{{_I}}})", "{{instance}}"
                        ),
                    ),
                ),
                summary(
                    title="Journal",
                    description="As infertune status has it. degraded: a journal was damaged, "
                    "look before anything else. interrupted: infertune recover.",
                    targets=(
                        Target(f"infertune_journal_state{{{_I}}} == 1", "{{instance}}: {{state}}"),
                    ),
                    named=True,
                ),
                summary(
                    title="Boot settings",
                    description="pending-reboot: they are tried at the next boot. failed: no "
                    "boot was confirmed, they were put back.",
                    targets=(
                        Target(f"infertune_boot_state{{{_I}}} == 1", "{{instance}}: {{state}}"),
                    ),
                    named=True,
                ),
            ),
        ),
        Row(
            "Knobs",
            (
                Panel(
                    title="Knobs of the profile",
                    description="What the applied profile asks for, what each knob holds now, in"
                    " how many files, and who set it last. All others: infertune "
                    "knobs.",
                    unit="none",
                    kind="table",
                    width=24,
                    height=8,
                    nothing="no profile is applied",
                    columns={
                        "instance": "Machine",
                        "knob": "Knob",
                        "wanted": "Wanted",
                        "now": "Now",
                        "Value": "Files",
                        "owner": "Owner",
                    },
                    targets=(Target(_KNOBS),),
                ),
            ),
        ),
        Row(
            "Measured here",
            (
                Panel(
                    title="What the settings do on this machine",
                    description="Found by infertune prove, as change of tokens per second. Stale: "
                    "kernel, model or server have changed since; measure again.",
                    unit="percentunit",
                    kind="table",
                    width=16,
                    height=8,
                    nothing="nothing was measured: infertune prove",
                    columns={
                        "instance": "Machine",
                        "profile": "Profile",
                        "setting": "Setting",
                        "arm": "Neighbours",
                        "model": "Model",
                        "verdict": "Verdict",
                        "Value": "Change",
                        "day": "Day",
                        "stale": "Stale",
                    },
                    targets=(Target(f"infertune_measured_change_ratio{{{_I}}}"),),
                ),
                Panel(
                    title="Kept beside busy neighbours",
                    description="Share of the quiet machine's tokens per second that is left, "
                    "under the profile and without it.",
                    unit="percentunit",
                    kind="table",
                    width=8,
                    height=8,
                    nothing="nothing was measured: infertune prove --stress",
                    columns={
                        "instance": "Machine",
                        "profile": "Profile",
                        "server": "Server",
                        "Value": "Kept",
                    },
                    targets=(Target(f"infertune_measured_kept_ratio{{{_I}}}"),),
                ),
            ),
        ),
        Row(
            "infertune itself",
            (
                Panel(
                    title="Probes",
                    description="Which are attached, which are not and why: infertune probes.",
                    unit="none",
                    kind="table",
                    width=8,
                    columns={"instance": "Machine", "probe": "Probe", "state": "State"},
                    targets=(Target(f"infertune_probe_state{{{_I}}} == 1"),),
                ),
                Panel(
                    title="Collectors",
                    description="absent: the machine has none of it. timeout, failed: the page / "
                    "of the exporter has the reason.",
                    unit="none",
                    kind="table",
                    width=8,
                    columns={"instance": "Machine", "collector": "Collector", "state": "State"},
                    targets=(Target(f"infertune_collector_state{{{_I}}} == 1"),),
                ),
                Panel(
                    title="CPU of the exporter",
                    description="CPU of the exporter, without its BPF programs. Above 10 %: scrape "
                    "less often, or collect[] less.",
                    unit="percentunit",
                    width=8,
                    targets=(
                        Target(
                            per_second(f'process_cpu_seconds_total{{{_I},job="infertune"}}'),
                            "{{instance}}",
                        ),
                    ),
                ),
            ),
        ),
        Row(
            "Details",
            (
                Panel(
                    title="Drift",
                    description="Files that are not as infertune set them, by knob. Again and "
                    "again: two tuners pull at one knob (infertune doctor).",
                    unit="none",
                    width=8,
                    nothing="no profile is applied",
                    targets=(Target(f"infertune_knob_drifted{{{_I}}}", "{{instance}} {{knob}}"),),
                ),
                Panel(
                    title="Knobs that are numbers",
                    description="Their values over time.",
                    unit="none",
                    width=8,
                    targets=(
                        Target(
                            f'infertune_knob_value{{{_I},knob=~"vm[.].*"}}',
                            "{{instance}} {{knob}}",
                        ),
                    ),
                ),
                Panel(
                    title="Files by owner",
                    description="Who set it: the system, infertune, or another program after it.",
                    width=8,
                    unit="none",
                    kind="table",
                    height=8,
                    columns={
                        "instance": "Machine",
                        "knob": "Knob",
                        "owner": "Owner",
                        "Value": "Files",
                    },
                    targets=(Target(f"infertune_knob_owner{{{_I}}} > 0"),),
                ),
                Panel(
                    title="Journal state",
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
                    title="Originals kept",
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
                Panel(
                    title="Duration of a collection",
                    description="How long the last collection took.",
                    unit="s",
                    width=4,
                    targets=(
                        Target(
                            f"infertune_exporter_collection_duration_seconds{{{_I}}}",
                            "{{instance}}",
                        ),
                    ),
                ),
            ),
            closed=True,
        ),
    ),
)
