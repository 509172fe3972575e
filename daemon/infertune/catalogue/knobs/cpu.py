# SPDX-License-Identifier: Apache-2.0
"""CPU frequency and idle states.

CPU and GPU of an APU share one power budget: a CPU that runs faster than it
must can take watts from the GPU.
"""

from infertune.catalogue.knobs.base import Evidence, Knob
from infertune.catalogue.values import Choice, QosRequest, Switch

_CPUFREQ = "/sys/devices/system/cpu/cpufreq"
_NO_CPUFREQ = "no cpufreq driver: the hypervisor or the firmware decides"

KNOBS: tuple[Knob, ...] = (
    Knob(
        id="cpufreq.scaling_governor",
        paths=(f"{_CPUFREQ}/policy*/scaling_governor",),
        value=Choice(
            ("performance", "powersave", "schedutil", "ondemand", "conservative", "userspace")
        ),
        choices_file="scaling_available_governors",
        summary="Who picks the clock of each core.",
        evidence=Evidence(
            "reported",
            "TuneD's accelerator-performance (which sets this among others): +5 to 8 % prefill, "
            "+2 to 3 % decode; the share of the governor alone is not known.",
            "pragmazest/strix-halo-optimizations log; strix-halo-guide",
        ),
        doc="Documentation/admin-guide/pm/cpufreq.rst",
        absent=_NO_CPUFREQ,
        risk="power",
        # amd-pstate in active mode sets EPP to performance together with this governor.
        touches=("cpufreq.energy_performance_preference",),
    ),
    Knob(
        id="cpufreq.energy_performance_preference",
        paths=(f"{_CPUFREQ}/policy*/energy_performance_preference",),
        value=Choice(("default", "performance", "balance_performance", "balance_power", "power")),
        choices_file="energy_performance_available_preferences",
        summary="Hint to the processor: speed or power (amd-pstate in active mode, Linux 6.3).",
        evidence=Evidence(
            "protective, unmeasured",
            "No published measurement separates it from the governor.",
            "Documentation/admin-guide/pm/amd-pstate.rst",
        ),
        doc="Documentation/admin-guide/pm/amd-pstate.rst",
        absent="the cpufreq driver has no energy preference (amd-pstate not in active mode)",
        risk="power",
        after=("cpufreq.scaling_governor",),
        # Under the governor performance the driver answers EBUSY to any other preference, so the
        # governor has to leave first on the way back too.
        restore_after=("cpufreq.scaling_governor",),
        locked_by=("cpufreq.scaling_governor", "performance"),
    ),
    Knob(
        id="cpufreq.boost",
        # Per policy since Linux 6.11, one switch for all before.
        paths=(f"{_CPUFREQ}/policy*/boost", f"{_CPUFREQ}/boost"),
        value=Switch(),
        summary="Whether cores may run above their base clock.",
        evidence=Evidence(
            "protective, unmeasured",
            "Without boost the CPU leaves power to the GPU; with it, single-threaded parts of "
            "a request run faster.",
            "Documentation/admin-guide/pm/cpufreq.rst",
        ),
        doc="Documentation/admin-guide/pm/cpufreq.rst",
        absent=_NO_CPUFREQ,
        risk="power",
    ),
    Knob(
        id="cpu_dma_latency",
        paths=("/dev/cpu_dma_latency",),
        # The kernel's own "no request" is 2000 s.
        value=QosRequest(0, 2_000_000_000),
        summary="Longest wake-up time of a CPU that is tolerated; bounds the idle states.",
        evidence=Evidence(
            "protective, unmeasured",
            "TuneD's accelerator-performance asks for 99 µs; its own effect on a GPU-offloaded "
            "model is not published.",
            "TuneD 2.28 profiles/accelerator-performance",
        ),
        doc="Documentation/power/pm_qos_interface.rst",
        absent="no PM-QoS device (a container, or a kernel without CONFIG_CPU_IDLE)",
        risk="power",
    ),
)
