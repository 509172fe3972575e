# SPDX-License-Identifier: Apache-2.0
"""One model server: what it achieves, beside what the kernel and the GPU did to it."""

from dashboards.base import (
    GREEN,
    ONE_INSTANCE,
    RED,
    SERVER,
    YELLOW,
    Dashboard,
    Panel,
    Row,
    Target,
    per_second,
    quantile,
    summary,
)

_S = 'instance=~"$instance",server=~"$server",server!=""'
_NO_METRICS = "no server that infertune knows answers with --metrics"
_NO_PROBE = "not attached: see Tuning, probes"
_ROCM = "not applicable (ROCm, or no DRM driver): its queues do not pass this scheduler"
_NO_KFD = "not applicable (Vulkan, or no KFD): nothing opened the compute driver"


def _model(name: str) -> str:
    return f"infertune_model_{name}{{{_S}}}"


_TOKENS = (
    f"{per_second(_model('tokens_predicted_total'))} "
    f"/ ({per_second(_model('tokens_predicted_seconds_total'))} > 0)"
)

MODEL = Dashboard(
    uid="infertune-model",
    title="infertune / Model",
    description="Tokens per second and latency beside faults, waiting for a CPU, and GPU queues; "
    "a line marks each profile that was applied. Shows servers of any engine that infertune "
    "knows: served, declared, adopted, or root's 'infertune run' (run:PROFILE).",
    variables=(ONE_INSTANCE, SERVER),
    rows=(
        Row(
            "At a glance",
            (
                summary(
                    title="Server",
                    description="How each server answers: no-metrics: start it with --metrics; "
                    "unreachable: infertune logs NAME.",
                    targets=(
                        Target(f"infertune_server_state{{{_S}}} == 1", "{{server}}: {{state}}"),
                    ),
                    named=True,
                    nothing="no server is known",
                ),
                summary(
                    title="Model",
                    description="What is loaded. Watching it loads nothing and wakes nothing.",
                    targets=(
                        Target(f'infertune_model_state{{{_S},state="loaded"}} == 1', "{{model}}"),
                    ),
                    named=True,
                    nothing="none is loaded",
                ),
                summary(
                    title="Tokens per second",
                    description="While it generates, as the engine counts.",
                    targets=(Target(_TOKENS, "{{server}} {{model}}"),),
                    nothing="idle, or no --metrics",
                ),
                summary(
                    title="Requests waiting",
                    description="For a slot. Waiting ones all the time: more parallel slots, if "
                    "the context fits.",
                    targets=(
                        Target(f"sum by (server) ({_model('requests_deferred')})", "{{server}}"),
                    ),
                    limits=((None, GREEN), (1, YELLOW)),
                    nothing=_NO_METRICS,
                ),
                summary(
                    title="Time to first token",
                    description="The mean of requests that ended just now, of vLLM and SGLang. "
                    "llama-server keeps no such count; infertune top and bench measure it.",
                    unit="s",
                    nothing="this engine does not tell, or is idle",
                    targets=(
                        Target(
                            f"{per_second(_model('first_token_seconds_total'))} "
                            f"/ ({per_second(_model('first_tokens_total'))} > 0)",
                            "{{server}} {{model}}",
                        ),
                    ),
                ),
                summary(
                    title="Major faults per second",
                    description="Each waits for a disk or for swap. After loading it should be 0.",
                    targets=(
                        Target(
                            "sum by (server) ("
                            + per_second(f'infertune_page_faults_total{{{_S},kind="major"}}')
                            + ")",
                            "{{server}}",
                        ),
                    ),
                    limits=((None, GREEN), (1, RED)),
                    nothing=_NO_PROBE,
                ),
            ),
        ),
        Row(
            "Speed",
            (
                Panel(
                    title="Generated tokens per second",
                    description="While it generates, as the engine counts. Falls with the "
                    "context; a step down without one is what this page is for.",
                    unit="none",
                    nothing=_NO_METRICS,
                    targets=(
                        Target(
                            f"{per_second(_model('tokens_predicted_total'))} "
                            f"/ ({per_second(_model('tokens_predicted_seconds_total'))} > 0)",
                            "{{server}} {{model}}",
                        ),
                    ),
                ),
                Panel(
                    title="Prompt tokens per second",
                    description="While it reads prompts. Grows with ubatch_size; far below the "
                    "GPU's compute, look at its clocks.",
                    unit="none",
                    nothing=_NO_METRICS,
                    targets=(
                        Target(
                            f"{per_second(_model('prompt_tokens_total'))} "
                            f"/ ({per_second(_model('prompt_seconds_total'))} > 0)",
                            "{{server}} {{model}}",
                        ),
                    ),
                ),
                Panel(
                    title="Requests",
                    description="In work, and waiting for a slot. Waiting ones all the time: more "
                    "parallel slots, if the context fits (infertune fit --parallel).",
                    unit="none",
                    nothing=_NO_METRICS,
                    targets=(
                        Target(_model("requests_processing"), "{{server}} {{model}} in work"),
                        Target(_model("requests_deferred"), "{{server}} {{model}} waiting"),
                    ),
                ),
            ),
        ),
        Row(
            "Latency and memory",
            (
                Panel(
                    title="Run-queue latency",
                    description="How long a runnable thread waited before it ran. The 99th "
                    "percentile above a millisecond: others share its CPUs; use cpus and "
                    "cpus_partition.",
                    unit="s",
                    nothing=_NO_PROBE,
                    targets=tuple(
                        Target(
                            quantile(
                                q, "infertune_run_queue_latency_seconds", _S, "instance, server"
                            ),
                            f"{{{{server}}}} {name}",
                        )
                        for q, name in ((0.5, "median"), (0.99, "99 %"))
                    ),
                ),
                Panel(
                    title="Thread time",
                    description="Running, waiting for a CPU, or blocked (a disk, a lock, the "
                    "GPU). With a GPU blocked is good: it waits for results.",
                    unit="percentunit",
                    stack=True,
                    nothing=_NO_PROBE,
                    targets=(
                        Target(
                            f"{per_second(f'infertune_thread_seconds_total{{{_S}}}')} "
                            "/ on (instance, server) group_left () sum by (instance, server) "
                            f"({per_second(f'infertune_thread_seconds_total{{{_S}}}')})",
                            "{{server}} {{state}}",
                        ),
                    ),
                ),
                Panel(
                    title="Memory of the unit",
                    description="Parts of what is charged; GTT is not in it.",
                    unit="bytes",
                    nothing="no server runs as a unit",
                    targets=(
                        Target(
                            f'infertune_unit_memory_part_bytes{{{_S},part=~"anon|file|shmem"}}',
                            "{{server}} {{part}}",
                        ),
                    ),
                ),
            ),
        ),
        Row(
            "Details: speed and state",
            (
                Panel(
                    title="Time per generated token",
                    description="The mean. One memory read of the active weights is its floor: "
                    "infertune expect has the figure.",
                    unit="s",
                    nothing=_NO_METRICS,
                    targets=(
                        Target(
                            f"{per_second(_model('tokens_predicted_seconds_total'))} "
                            f"/ ({per_second(_model('tokens_predicted_total'))} > 0)",
                            "{{server}} {{model}}",
                        ),
                    ),
                ),
                Panel(
                    title="Energy per generated token",
                    description="Of the whole processor package, over the tokens of all servers: "
                    "what a lower power limit saves, beside the speed it costs.",
                    unit="joule",
                    nothing="no counter of energy, or no server answers with --metrics",
                    targets=(
                        Target(
                            "sum by (instance) ("
                            + per_second(
                                'infertune_package_energy_joules_total{instance=~"$instance"}'
                            )
                            + ") / (sum by (instance) ("
                            + per_second(_model("tokens_predicted_total"))
                            + ") > 0)",
                            "{{instance}}",
                        ),
                    ),
                ),
                Panel(
                    title="Batch occupancy",
                    description="Slots that shared one pass over the weights: above 1, tokens of "
                    "several requests cost one read.",
                    unit="none",
                    nothing=_NO_METRICS,
                    targets=(Target(_model("busy_slots_per_decode"), "{{server}} {{model}}"),),
                ),
                Panel(
                    title="Server state",
                    description="How each declared server answers. unreachable: infertune logs "
                    "NAME. no-metrics: start it with --metrics. unknown-engine: say engine = in "
                    "its declaration.",
                    width=8,
                    unit="none",
                    kind="state-timeline",
                    nothing="no server is known",
                    words={"0": (" ", GREEN), "1": ("yes", YELLOW)},
                    targets=(
                        Target(
                            f"infertune_server_state{{{_S}}} == 1",
                            "{{server}} {{state}}",
                        ),
                    ),
                ),
                Panel(
                    title="Model state",
                    description="What each model of a server is. Watching it loads none and wakes "
                    "none; one that sleeps or is not loaded has no other values.",
                    width=8,
                    unit="none",
                    kind="state-timeline",
                    nothing="no server answers",
                    words={"0": (" ", GREEN), "1": ("yes", YELLOW)},
                    targets=(
                        Target(
                            f"infertune_model_state{{{_S}}} == 1",
                            "{{server}} {{model}} {{state}}",
                        ),
                    ),
                ),
                Panel(
                    title="KV cache in use",
                    description="Of vLLM and SGLang, which share one among all requests. Full: "
                    "requests wait or are computed again. llama-server does not tell.",
                    unit="percentunit",
                    nothing="no engine that tells",
                    targets=(Target(_model("kv_cache_usage_ratio"), "{{server}} {{model}}"),),
                ),
            ),
            closed=True,
        ),
        Row(
            "Details: kernel and memory",
            (
                Panel(
                    title="Major faults",
                    description="Each waited for a disk or for swap. After loading it should be "
                    "0: raise memory_min, use mlock, or a smaller model.",
                    unit="none",
                    nothing=_NO_PROBE,
                    targets=(
                        Target(
                            per_second(f'infertune_page_faults_total{{{_S},kind="major"}}'),
                            "{{server}}",
                        ),
                    ),
                ),
                Panel(
                    title="Minor faults",
                    description="Pages that were in memory but not mapped yet. Many while it "
                    "answers: huge pages are not used (infertune doctor).",
                    unit="none",
                    nothing=_NO_PROBE,
                    targets=(
                        Target(
                            per_second(f'infertune_page_faults_total{{{_S},kind="minor"}}'),
                            "{{server}}",
                        ),
                    ),
                ),
                Panel(
                    title="Context switches per second",
                    description="Voluntary: it waited for something. Involuntary: another thread "
                    "was put in its place.",
                    unit="none",
                    nothing=_NO_PROBE,
                    targets=(
                        Target(
                            per_second(f"infertune_context_switches_total{{{_S}}}"),
                            "{{server}} {{kind}}",
                        ),
                    ),
                ),
                Panel(
                    title="CPU migrations per second",
                    description="Each leaves warm caches behind. Many: pin it with cpus.",
                    unit="none",
                    nothing=_NO_PROBE,
                    targets=(
                        Target(
                            per_second(f"infertune_thread_migrations_total{{{_S}}}"),
                            "{{server}}",
                        ),
                    ),
                ),
                Panel(
                    title="Memory limits reached",
                    description="How often a second reclaim took protected memory (low), or a "
                    "limit was reached (high, max), and OOM kills.",
                    unit="none",
                    nothing="no server runs as a unit",
                    targets=(
                        Target(
                            per_second(f"infertune_unit_memory_events_total{{{_S}}}"),
                            "{{server}} {{event}}",
                        ),
                    ),
                ),
                Panel(
                    title="Huge and locked memory",
                    description="Mapped memory by kind; parts overlap. Locked should cover the "
                    "model where mlock is asked for.",
                    unit="bytes",
                    nothing="no server runs as a unit",
                    targets=(
                        Target(
                            f"infertune_server_memory_bytes{{{_S}}}",
                            "{{server}} {{part}}",
                        ),
                    ),
                ),
                Panel(
                    title="Waiting for memory",
                    description="Share of time in which all its tasks stood still for lack of "
                    "memory or of a disk (PSI of its unit).",
                    unit="percentunit",
                    nothing="no server runs as a unit, or no PSI",
                    targets=(
                        Target(
                            per_second(
                                "infertune_pressure_stalled_seconds_total"
                                f'{{{_S},share="full",resource=~"memory|io"}}'
                            ),
                            "{{server}} {{resource}}",
                        ),
                    ),
                ),
            ),
            closed=True,
        ),
        Row(
            "Details: GPU",
            (
                Panel(
                    title="Vulkan: jobs per second",
                    description="Jobs done by ring. With a ROCm server this is empty by design: "
                    "see the queues beside it.",
                    unit="none",
                    nothing=_ROCM,
                    targets=(
                        Target(
                            "sum by (instance, ring) ("
                            + per_second(f'infertune_drm_scheduler_jobs_total{{{_S},event="done"}}')
                            + ")",
                            "{{ring}}",
                        ),
                    ),
                ),
                Panel(
                    title="Vulkan: job latency (p99)",
                    description="99th percentile of the wait in the queue, and of the time on the "
                    "ring (with the jobs before it).",
                    unit="s",
                    nothing=_ROCM,
                    targets=(
                        Target(
                            quantile(
                                0.99, "infertune_drm_scheduler_wait_seconds", _S, "instance, ring"
                            ),
                            "{{ring}} wait",
                        ),
                        Target(
                            quantile(
                                0.99, "infertune_drm_scheduler_run_seconds", _S, "instance, ring"
                            ),
                            "{{ring}} on the ring",
                        ),
                    ),
                ),
                Panel(
                    title="Vulkan: engines busy",
                    description="Share of time an engine worked for the server.",
                    unit="percentunit",
                    nothing=_ROCM,
                    targets=(
                        Target(
                            per_second(f"infertune_drm_engine_busy_seconds_total{{{_S}}}"),
                            "{{server}} {{engine}}",
                        ),
                    ),
                ),
                Panel(
                    title="ROCm: time its queues were evicted",
                    description="The model stood still for it, mostly for lack of memory. "
                    "Anything but 0: less context, or fewer servers.",
                    unit="percentunit",
                    nothing=_NO_KFD,
                    targets=(
                        Target(
                            per_second(f"infertune_kfd_evicted_seconds_total{{{_S}}}"),
                            "{{server}}",
                        ),
                    ),
                ),
                Panel(
                    title="ROCm: GPU memory",
                    description="Allocated through the compute driver.",
                    unit="bytes",
                    nothing=_NO_KFD,
                    targets=(Target(f"infertune_kfd_memory_bytes{{{_S}}}", "{{server}}"),),
                ),
                Panel(
                    title="Resident GPU memory",
                    description="By region, of Vulkan and ROCm alike; evicted is what was pushed "
                    "out of the carve-out.",
                    unit="bytes",
                    nothing="no DRM client",
                    targets=(
                        Target(
                            f"infertune_drm_memory_resident_bytes{{{_S}}}",
                            "{{server}} {{region}}",
                        ),
                        Target(
                            f"infertune_drm_memory_evicted_bytes{{{_S}}}",
                            "{{server}} evicted",
                        ),
                    ),
                ),
                Panel(
                    title="Compute path",
                    description="Whether the scheduler's probe is attached, and how many queues "
                    "of the compute driver (ROCm) the server has. Without either it computes on "
                    "the CPU.",
                    unit="none",
                    kind="stat",
                    width=24,
                    height=4,
                    nothing="neither",
                    targets=(
                        Target(
                            f"infertune_kfd_queues{{{_S}}}",
                            "{{server}}: queues of ROCm",
                        ),
                        Target(
                            'infertune_probe_state{instance=~"$instance",probe="drm_scheduler"} '
                            "== 1",
                            "{{instance}}: probe of the scheduler {{state}}",
                        ),
                    ),
                ),
            ),
            closed=True,
        ),
    ),
)
