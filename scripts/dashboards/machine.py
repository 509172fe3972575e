# SPDX-License-Identifier: Apache-2.0
"""One machine: its one memory, its GPU and its CPUs."""

from dashboards.base import (
    GREEN,
    ONE_INSTANCE,
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
_NO_GPU = "no amdgpu"
_NO_METRICS = "no server answers with --metrics"
_NO_TABLE = "not applicable: this GPU has no table of its power firmware"


def _memory(kind: str) -> str:
    return f'infertune_memory_bytes{{{_I},kind="{kind}"}}'


def _pool(what: str, pool: str) -> str:
    return f'sum by (instance) (infertune_gpu_memory_{what}{{{_I},pool="{pool}"}})'


def _judged(what: str) -> str:
    """The judge's answer: what 'infertune machine' and 'infertune fit' say as well."""
    return f"infertune_gpu_pool_{what}{{{_I}}}"


_THROTTLED = per_second(f"infertune_gpu_metrics_throttle_cycles_total{{{_I}}}")
_GENERATED = f"infertune_model_tokens_predicted_total{{{_I}}}"
_TOTAL = f"sum by (instance) ({_memory('total')})"
# Not held at 0: a value below it says that what is shown cannot all be so.
_CPU_SIDE = (
    f"{_TOTAL} - sum by (instance) ({_memory('available')}) "
    f"- ({_pool('used_bytes', 'gtt')} or 0 * {_TOTAL})"
)


def _stalls(metric: str, probe: str) -> str:
    """Seconds per second; a probe that is attached and has counted nothing says 0."""
    attached = f'infertune_probe_state{{{_I},probe="{probe}",state="attached"}} == 1'
    counted = per_second(f"{metric}_sum{{{_I}}}")
    return f"sum by (instance) ({counted}) or 0 * sum by (instance) ({attached})"


MACHINE = Dashboard(
    uid="infertune-machine",
    title="infertune / Machine",
    description="One memory, one GPU, its CPUs: who has what, and what holds them back.",
    variables=(ONE_INSTANCE,),
    rows=(
        Row(
            "At a glance",
            (
                summary(
                    title="Profile",
                    description="The profile in force. None: everything is as the system has it.",
                    targets=(Target(f"infertune_profile_info{{{_I}}}", "{{profile}}"),),
                    named=True,
                    nothing="none",
                ),
                summary(
                    title="Tokens per second",
                    description="Generated now by all servers of this machine.",
                    targets=(
                        Target(f"sum by (instance) ({per_second(_GENERATED)})", "all servers"),
                    ),
                    nothing=_NO_METRICS,
                ),
                summary(
                    title="GPU memory in use",
                    description="Share of the memory the GPU allocates from (GTT, or a larger "
                    "carve-out) that is in use, whoever holds it. Above 95 % the next allocation "
                    "fails or evicts: 'infertune machine' names who holds it and what limits it.",
                    unit="percentunit",
                    nothing=_NO_GPU,
                    limits=((None, GREEN), (0.85, YELLOW), (0.95, RED)),
                    targets=(Target(f"{_judged('held_bytes')} / {_judged('bytes')}", "{{pool}}"),),
                ),
                summary(
                    title="GPU memory limit",
                    description="How much the GPU may hold: the smallest of GTT, the TTM limit and "
                    "RAM, or the carve-out. Less at the next boot: a size that was only written "
                    "does not last; 'infertune boot stage' makes it.",
                    unit="bytes",
                    nothing=_NO_GPU,
                    targets=(
                        Target(_judged("bytes"), "now, {{pool}}"),
                        Target(
                            f"infertune_gpu_pool_next_boot_bytes{{{_I}}}", "next boot, {{pool}}"
                        ),
                    ),
                ),
                summary(
                    title="Throttled",
                    description="Whether any limiter was engaged just now: heat, a power limit, "
                    "or the board. Details has which.",
                    targets=(Target(f"max by (instance) ({_THROTTLED}) > bool 0", "now"),),
                    words={"0": ("no", GREEN), "1": ("yes", YELLOW)},
                    nothing=_NO_TABLE,
                ),
                summary(
                    title="Power",
                    description="Of the whole processor: CPU and GPU share it.",
                    targets=(
                        Target(
                            f'infertune_gpu_metrics_power_watts{{{_I},domain="apu"}}', "package"
                        ),
                    ),
                    unit="watt",
                    nothing=_NO_TABLE,
                ),
            ),
        ),
        Row(
            "Memory",
            (
                Panel(
                    title="Memory",
                    description="Carve-out, GTT in use, what the CPU side uses, and what is "
                    "available, stacked: MemTotal and the carve-out. If available nears zero, "
                    "choose a smaller context or stop a server (infertune fit). CPU side is the "
                    "rest; below zero, the kernel's figures contradict each other.",
                    unit="bytes",
                    width=8,
                    height=9,
                    stack=True,
                    targets=(
                        Target(_pool("bytes", "vram"), "carve-out"),
                        Target(_pool("used_bytes", "gtt"), "GTT in use"),
                        Target(_CPU_SIDE, "CPU side"),
                        Target(_memory("available"), "available"),
                    ),
                ),
                Panel(
                    title="Servers' memory",
                    description="Charged to each server's unit, and what of it is protected. GTT "
                    "is charged to no unit and is not in it.",
                    height=9,
                    unit="bytes",
                    nothing="no server runs as a unit",
                    targets=(
                        Target(
                            f'infertune_unit_memory_bytes{{{_I},server!=""}}',
                            "{{server}} charged",
                        ),
                        Target(
                            f'infertune_unit_memory_protected_bytes{{{_I},server!="",limit="min"}}',
                            "{{server}} protected",
                        ),
                    ),
                ),
                Panel(
                    title="Pressure (PSI)",
                    description="Share of time in which some tasks, or all of them (full), stood "
                    "still for lack of it (PSI). Full memory pressure above a few per cent is "
                    "felt in every token.",
                    height=9,
                    unit="percentunit",
                    nothing="this kernel has no PSI (psi=1)",
                    targets=(
                        Target(
                            per_second(
                                "infertune_pressure_stalled_seconds_total"
                                f'{{{_I},unit="system",share="some"}}'
                            ),
                            "{{resource}} some",
                        ),
                        Target(
                            per_second(
                                "infertune_pressure_stalled_seconds_total"
                                f'{{{_I},unit="system",share="full"}}'
                            ),
                            "{{resource}} full",
                        ),
                    ),
                ),
            ),
        ),
        Row(
            "GPU",
            (
                Panel(
                    title="Clocks",
                    description="Clock now, beside the highest power level. A sleeping GPU shows "
                    "low values; only under load does a gap mean a limit.",
                    unit="hertz",
                    nothing=_NO_GPU,
                    targets=(
                        Target(f"infertune_gpu_clock_hertz{{{_I}}}", "{{gpu}} {{clock}}"),
                        Target(
                            f'infertune_gpu_dpm_clock_max_hertz{{{_I},clock=~"sclk|mclk"}}',
                            "{{gpu}} {{clock}} highest",
                        ),
                    ),
                ),
                Panel(
                    title="Power by domain",
                    description="Power by domain and the sustained limit. CPU and GPU share what "
                    "the socket has: busy CPU threads take it from the GPU.",
                    unit="watt",
                    nothing=_NO_TABLE,
                    targets=(
                        Target(f"infertune_gpu_metrics_power_watts{{{_I}}}", "{{domain}}"),
                        Target(f"infertune_gpu_power_watts{{{_I}}}", "{{gpu}} {{reading}} (hwmon)"),
                        Target(
                            f"infertune_gpu_metrics_power_limit_watts{{{_I}}}",
                            "limit {{limit}}",
                        ),
                    ),
                ),
                Panel(
                    title="Memory traffic",
                    description="By client and direction. Generating tokens is bound by it: near "
                    "what infertune expect measured means nothing is left to tune.",
                    unit="Bps",
                    nothing=_NO_TABLE,
                    targets=(
                        Target(
                            f"infertune_gpu_metrics_traffic_bytes_per_second{{{_I}}}",
                            "{{client}} {{direction}}",
                        ),
                    ),
                ),
            ),
        ),
        Row(
            "Details",
            (
                Panel(
                    title="GPU busy",
                    description="As the power firmware counts it; sees ROCm and Vulkan alike.",
                    unit="percentunit",
                    nothing=_NO_GPU,
                    targets=(Target(f"infertune_gpu_busy_ratio{{{_I}}}", "{{gpu}}"),),
                ),
                Panel(
                    title="Temperature",
                    description="By sensor. Rising with a falling clock: clean the fan, or lower "
                    "the power limit and keep the clock.",
                    unit="celsius",
                    nothing=_NO_GPU,
                    targets=(
                        Target(
                            f"infertune_gpu_temperature_celsius{{{_I}}}",
                            "{{gpu}} {{sensor}}",
                        ),
                        Target(
                            "infertune_gpu_metrics_temperature_celsius"
                            f'{{{_I},sensor=~"gfx|soc|skin"}}',
                            "{{sensor}}",
                        ),
                    ),
                ),
                Panel(
                    title="Throttle reasons",
                    description="Which limiter was engaged, in cycles of the firmware's timer: "
                    "compare them with each other. thm_*: heat. spl, fppt, sppt: power limits. "
                    "prochot: the board.",
                    unit="none",
                    nothing=_NO_TABLE,
                    targets=(
                        Target(
                            per_second(f"infertune_gpu_metrics_throttle_cycles_total{{{_I}}}"),
                            "{{limiter}}",
                        ),
                    ),
                ),
                Panel(
                    title="Huge pages in use",
                    description="Of the whole machine: anonymous, of files, shared.",
                    unit="bytes",
                    targets=(Target(f"infertune_thp_memory_bytes{{{_I}}}", "{{kind}}"),),
                ),
                Panel(
                    title="Huge pages per second",
                    description="fault_fallback and collapse_alloc_failed: there was none, and "
                    "small ones were taken. split_page: one was taken apart.",
                    unit="none",
                    targets=(
                        Target(per_second(f"infertune_thp_events_total{{{_I}}}"), "{{event}}"),
                    ),
                ),
                Panel(
                    title="Direct reclaim and compaction",
                    description="Seconds per second that threads spent freeing or moving memory "
                    "before they got any. Long loads come with it: more free memory "
                    "(vm.min_free_kbytes, watermark_scale_factor), fewer huge pages at once.",
                    unit="percentunit",
                    nothing="not attached: see Tuning, probes",
                    targets=(
                        Target(
                            _stalls("infertune_direct_reclaim_seconds", "reclaim"),
                            "reclaim",
                        ),
                        Target(
                            _stalls("infertune_compaction_stall_seconds", "compaction"),
                            "compaction",
                        ),
                    ),
                ),
                Panel(
                    title="CPU clocks",
                    description="Lowest, mean and highest clock over all policies.",
                    unit="hertz",
                    width=8,
                    nothing="not applicable: no cpufreq driver (a virtual machine?)",
                    targets=tuple(
                        Target(
                            f"{what} by (instance) (infertune_cpu_clock_hertz{{{_I}}})",
                            name,
                        )
                        for what, name in (("min", "lowest"), ("avg", "mean"), ("max", "highest"))
                    ),
                ),
                Panel(
                    title="Free CMA",
                    description="CmaFree counts as available, but the GPU's pages cannot be in "
                    "it. Much of it and little else available: an allocation fails though memory "
                    "looks free.",
                    unit="bytes",
                    width=4,
                    height=8,
                    kind="stat",
                    targets=(Target(_memory("cma_free"), "free"),),
                ),
                Panel(
                    title="Swap in use",
                    description="Anything here while a server answers is a model on disk: see the "
                    "major faults of the server, and raise memory_min.",
                    unit="bytes",
                    width=4,
                    height=8,
                    kind="stat",
                    limits=((None, GREEN), (1, YELLOW)),
                    targets=(
                        Target(
                            f"{_memory('swap_total')} - on (instance) {_memory('swap_free')}",
                            "{{instance}}",
                        ),
                    ),
                ),
                Panel(
                    title="NPU",
                    description="Whether it is awake. It shares the memory, and amd_iommu=off "
                    "takes it away.",
                    height=8,
                    unit="none",
                    width=4,
                    kind="stat",
                    nothing="no NPU driver",
                    words={"0": ("asleep", GREEN), "1": ("awake", YELLOW)},
                    targets=(Target(f"infertune_npu_active{{{_I}}}", "{{npu}}"),),
                ),
                Panel(
                    title="Hardware",
                    description="Kernel and processor; infertune doctor knows which are bad.",
                    height=8,
                    unit="none",
                    width=4,
                    kind="table",
                    columns={"kernel": "Kernel", "processor": "Processor"},
                    targets=(Target(f"infertune_machine_info{{{_I}}}"),),
                ),
            ),
            closed=True,
        ),
    ),
)
