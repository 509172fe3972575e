# SPDX-License-Identifier: Apache-2.0
"""All machines: which profile each has, who is not well, who is slower than the others."""

from dashboards.base import (
    GREEN,
    INSTANCE,
    RED,
    YELLOW,
    Dashboard,
    Panel,
    Row,
    Target,
)

_I = 'instance=~"$instance"'
_TOKENS = "instance_server_model:infertune_tokens_predicted:per_second"


# A machine without a profile has its row as well.
_MACHINES = (
    f"(infertune_machine_info{{{_I}}} "
    f"* on (instance) group_left (version) infertune_exporter_info{{{_I}}} "
    f"* on (instance) group_left (profile, backend) infertune_profile_info{{{_I}}}) "
    f"or (infertune_machine_info{{{_I}}} "
    f"* on (instance) group_left (version) infertune_exporter_info{{{_I}}} "
    f"unless on (instance) infertune_profile_info{{{_I}}})"
)


def _count(title: str, description: str, expr: str, *, bad: bool = True) -> Panel:
    return Panel(
        title=title,
        description=description,
        unit="none",
        width=4,
        height=4,
        kind="stat",
        limits=((None, GREEN), (1, RED)) if bad else ((None, GREEN),),
        targets=(Target(f"{expr} or vector(0)", title),),
    )


FLEET = Dashboard(
    uid="infertune-fleet",
    title="infertune / Fleet",
    description="Machines by profile, health and version, and the outliers among them.",
    variables=(INSTANCE,),
    rows=(
        Row(
            "At a glance",
            (
                _count(
                    "Machines",
                    "Exporters that answer.",
                    f'count(up{{{_I},job="infertune"}} == 1)',
                    bad=False,
                ),
                _count(
                    "Not answering",
                    "Exporters that do not: the machine is off, or systemctl status "
                    "infertune-exporter on it.",
                    f'count(up{{{_I},job="infertune"}} == 0)',
                ),
                _count(
                    "Drifted",
                    "Machines with a knob that another program changed.",
                    f"count(sum by (instance) (infertune_knob_drifted{{{_I}}}) > 0)",
                ),
                _count(
                    "Unhealthy journals",
                    "degraded or interrupted: infertune status on the machine.",
                    f'count(infertune_journal_state{{{_I},state=~"degraded|interrupted"}} == 1)',
                ),
                _count(
                    "Waiting for a reboot",
                    "Boot settings are staged there and not in force.",
                    f'count(infertune_boot_state{{{_I},state="pending-reboot"}} == 1)',
                ),
                _count(
                    "Alerts",
                    "Alerts of infertune that fire now.",
                    f'count(ALERTS{{{_I},alertname=~"Infertune.*",alertstate="firing"}})',
                ),
            ),
        ),
        Row(
            "Machines",
            (
                Panel(
                    title="Machines",
                    description="Each machine with its profile, kernel and product. One whose "
                    "profile differs among its like was not rolled out, or went "
                    "back.",
                    unit="none",
                    kind="table",
                    width=24,
                    height=6,
                    nothing="no machine answers",
                    columns={
                        "instance": "Machine",
                        "profile": "Profile",
                        "backend": "Backend",
                        "version": "infertune",
                        "kernel": "Kernel",
                        "product": "Product",
                    },
                    targets=(Target(_MACHINES),),
                ),
            ),
        ),
        Row(
            "Outliers",
            (
                Panel(
                    title="Tokens per second, the ten slowest",
                    description="While they generate. Alike machines with one model should be "
                    "alike: compare kernel, power limit, temperature.",
                    unit="none",
                    width=12,
                    nothing="no declared server answers with --metrics",
                    targets=(
                        Target(
                            f"bottomk(10, {_TOKENS}{{{_I}}})", "{{instance}} {{server}} {{model}}"
                        ),
                    ),
                ),
                Panel(
                    title="Memory available, the ten lowest",
                    description="Share of the CPU side's memory.",
                    unit="percentunit",
                    width=12,
                    targets=(
                        Target(
                            f"bottomk(10, instance:infertune_memory_available:ratio{{{_I}}})",
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
                    title="Profiles",
                    description="Machines by applied profile. One that is missing among its like "
                    "was not rolled out, or went back.",
                    unit="none",
                    width=8,
                    kind="table",
                    nothing="no machine has a profile",
                    columns={"profile": "Profile", "backend": "Backend", "Value": "Machines"},
                    targets=(
                        Target(f"count by (profile, backend) (infertune_profile_info{{{_I}}})"),
                    ),
                ),
                Panel(
                    title="Versions",
                    description="Of infertune. Two for long: a roll-out stopped in the middle.",
                    unit="none",
                    width=8,
                    kind="table",
                    columns={"version": "Version", "Value": "Machines"},
                    targets=(Target(f"count by (version) (infertune_exporter_info{{{_I}}})"),),
                ),
                Panel(
                    title="Kernels",
                    description="Which are known bad says infertune doctor.",
                    unit="none",
                    width=8,
                    kind="table",
                    columns={"product": "Product", "kernel": "Kernel", "Value": "Machines"},
                    targets=(
                        Target(f"count by (product, kernel) (infertune_machine_info{{{_I}}})"),
                    ),
                ),
                Panel(
                    title="Major faults, the ten highest",
                    description="Per second and server.",
                    unit="none",
                    nothing="no probe is attached",
                    targets=(
                        Target(
                            f"topk(10, instance_server:infertune_major_faults:rate5m{{{_I}}})",
                            "{{instance}} {{server}}",
                        ),
                    ),
                ),
                Panel(
                    title="Hottest GPUs",
                    description="Highest temperature of each machine's GPU.",
                    unit="celsius",
                    nothing="no amdgpu",
                    targets=(
                        Target(
                            "topk(10, max by (instance) "
                            f"(infertune_gpu_temperature_celsius{{{_I}}}))",
                            "{{instance}}",
                        ),
                    ),
                ),
                Panel(
                    title="Drift",
                    description="Files that are not as infertune set them.",
                    unit="none",
                    nothing="no machine has a profile",
                    limits=((None, GREEN), (1, YELLOW)),
                    targets=(
                        Target(
                            f"sum by (instance) (infertune_knob_drifted{{{_I}}})", "{{instance}}"
                        ),
                    ),
                ),
            ),
            closed=True,
        ),
    ),
)
