# SPDX-License-Identifier: Apache-2.0
"""Memory: sizes that do not fit together, limits that bite, pages that help nobody."""

from __future__ import annotations

from infertune.base.units import GIB, MIB, PAGES_PER_GIB, format_size
from infertune.doctor.base import (
    Answer,
    Finding,
    Missing,
    Rule,
    Source,
    Unknown,
    When,
    github,
    kernel_doc,
    linux,
    llama,
    need,
    rocm,
)
from infertune.doctor.conditions import AMDGPU, INTEGRATED, STRIX_HALO
from infertune.doctor.facts import Facts
from infertune.pools.boot import Outlook, most_for_gpu
from infertune.pools.facts import PoolFacts
from infertune.pools.judge import (
    Limit,
    Pool,
    gpu_pool,
    gttsize_in_force,
    held_by,
    is_default,
    ttm_limit,
)

_SANE = 1 << 50


def _sane(size: int | None, what: str) -> int:
    """A size that can be one.  Raises Missing."""
    if size is None or not 0 < size <= _SANE:
        raise Missing(Unknown(what))
    return size


def _ram(facts: Facts) -> int:
    """Raises Missing."""
    return _sane(facts.memory.ram, "the size of RAM is not known")


def _limit(facts: PoolFacts) -> Limit:
    """What TTM lets the GPU take.  Raises Missing."""
    if facts.ttm is None:
        raise Missing(Unknown("no TTM module of amdgpu's was found"))
    limit = ttm_limit(facts)
    _sane(limit.bytes if limit else None, f"{facts.ttm.module}.pages_limit cannot be read")
    return need(limit or Unknown(f"{facts.ttm.module}.pages_limit cannot be read"))


def _pool(facts: Facts) -> Pool:
    """The memory the GPU allocates from.  Raises Missing."""
    return need(gpu_pool(facts.memory, "vulkan"))


def _outlook(facts: Facts, least: int, how: str) -> Outlook | None:
    """The first way to so many bytes that says ``how``; long-context's before all others."""
    known = [each for each in facts.outlooks if how in each.text]
    ways = sorted(known, key=lambda each: "long-context" not in each.text)
    for way in ways:
        pool = gpu_pool(way.facts, "vulkan")
        if not isinstance(pool, Unknown) and pool.bytes >= least:
            return way
    return None


def _way(facts: Facts, least: int, how: str = "") -> str | None:
    """What to type for so many bytes, and what that brings; None where no way leads there."""
    way = _outlook(facts, least, how)
    pool = gpu_pool(way.facts, "vulkan") if way else None
    if way is None or pool is None or isinstance(pool, Unknown):
        return None
    return f"{way.text}: {format_size(pool.bytes)}"


def _smaller(facts: Facts, too_large: PoolFacts) -> str:
    """A limit that leaves enough, with the number to write."""
    most = most_for_gpu(too_large.ram or 0) // GIB
    module = too_large.ttm.module if too_large.ttm else "ttm"
    by_hand = f"{module}.pages_limit={most * PAGES_PER_GIB} ({most} GiB) at boot, or less"
    way = _way(facts, 0, "infertune boot ")
    return f"{way}; or {by_hand}" if way else by_hand


def _limit_above_ram(facts: Facts) -> Answer:
    for when, each in (("", facts.memory), ("after the next boot ", facts.next_boot)):
        if isinstance(each, Unknown):
            continue
        limit, total = _limit(each), each.ram or 0
        if each.ram_is_the_hosts and limit.bytes > total > 0:
            text = (
                f"{when}the TTM limit is {format_size(limit.bytes)} and RAM is "
                f"{format_size(total)}: the GPU can take everything, and the OOM killer does not "
                "see what it holds"
            )
            return Finding(text, fix=_smaller(facts, each))
    _ram(facts)
    return None


def _limit_close_to_ram(facts: Facts) -> Answer:
    limit, ram = _limit(facts.memory), _ram(facts)
    if limit.bytes > ram or limit.bytes <= 0.9 * ram or not facts.memory.ram_is_the_hosts:
        return None
    text = (
        f"the TTM limit is {format_size(limit.bytes)} of {format_size(ram)}: "
        f"{format_size(ram - limit.bytes)} are left for everything else"
    )
    return Finding(text, fix=_smaller(facts, facts.memory))


def _limit_is_default(facts: Facts) -> Answer:
    _limit(facts.memory)
    _ram(facts)
    pool = _pool(facts)
    if not is_default(facts.memory) or pool.limit.setting != "default" or _promised(facts):
        return None  # with a larger carve-out the driver allocates there: carveout-large
    text = f"GPU memory is the kernel's default, half of RAM: {format_size(pool.bytes)}"
    return Finding(text, fix=_way(facts, pool.bytes + GIB))


def _promised(facts: Facts) -> Answer:
    """GTT above the TTM limit: a size that nobody keeps."""
    pool = _pool(facts)
    gtt, limit = facts.memory.memory.gtt_bytes or 0, _limit(facts.memory)
    if pool.name != "GTT" or gtt < limit.bytes + 64 * MIB:
        return None
    size = gttsize_in_force(facts.memory)
    who = f"amdgpu.gttsize promises {format_size(gtt)}" if size else f"GTT is {format_size(gtt)}"
    text = f"{who}, but TTM allows the GPU {format_size(limit.bytes)}: {limit.why}"
    asked = facts.memory.configured.gttsize
    way = _way(facts, pool.bytes + GIB)
    if size and asked and way and "gttsize" not in way:
        way = f"remove amdgpu.gttsize from {asked.origin}, then {way}"
    return Finding(text, fix=way)


def _not_taken_over(facts: Facts) -> Answer:
    limit, gtt = _limit(facts.memory), _sane(facts.gpu.gtt_bytes, "the GTT limit cannot be read")
    if limit.bytes <= gtt + 64 * MIB or gttsize_in_force(facts.memory) is not None:
        return None  # gtt-above-ttm and gtt-sizes-differ have the reason
    if gtt >= 0.98 * _ram(facts):
        return None  # the driver capped it to RAM: ttm-above-ram
    return Finding(
        f"the TTM limit is {format_size(limit.bytes)} and the driver's GTT {format_size(gtt)}: "
        "it takes the limit once, when it is loaded"
    )


def _carveout_wasted(facts: Facts) -> Answer:
    reserved = _sane(facts.gpu.vram_bytes, "the carve-out cannot be read")
    pool = _pool(facts)
    # 4 GiB is what a Z13 shows at its firmware's smallest choice.
    if reserved <= 4 * GIB or pool.name != "GTT":
        return None
    text = (
        f"{format_size(reserved)} are carved out for the GPU, and with a larger GTT of "
        f"{format_size(pool.bytes)} ROCm allocates there: the carve-out is wasted"
    )
    return Finding(text, fix=_way(facts, pool.bytes + GIB, "smallest carve-out"))


def _carveout_large(facts: Facts) -> Answer:
    pool = _pool(facts)
    if pool.name != "carve-out" or pool.bytes <= 4 * GIB:
        return None
    text = (
        f"the GPU allocates from its carve-out of {format_size(pool.bytes)}: Linux has "
        f"{format_size(_ram(facts))} left, and a TTM limit below the carve-out changes "
        "nothing"
    )
    return Finding(text, fix=_way(facts, pool.bytes + GIB))


def _held(facts: Facts) -> Answer:
    pool = _pool(facts)
    if pool.held is None:
        return Unknown("the driver does not say how much memory of the GPU is in use")
    if pool.held < pool.bytes / 4:
        return None
    text = (
        f"{format_size(pool.held)} of the GPU's {format_size(pool.bytes)} are in use: "
        f"{held_by(pool)}"
    )
    return Finding(text)


def _next_boot(facts: Facts) -> Answer:
    pool = _pool(facts)
    then = gpu_pool(need(facts.next_boot), "vulkan")
    if isinstance(then, Unknown) or then.bytes > pool.bytes - GIB:
        return None
    return Finding(
        f"after the next boot the GPU may hold {format_size(then.bytes)}, now "
        f"{format_size(pool.bytes)}: {then.limit.why}"
    )


def _no_system_limit(facts: Facts) -> Answer:
    if need(facts.option("amdgpu", "no_system_mem_limit")) not in ("1", "Y"):
        return None
    return Finding("amdgpu.no_system_mem_limit is on: compute may take all memory")


def _locked(facts: Facts) -> Answer:
    limit = need(facts.paging).locked_limit
    servers = [
        server
        for server in need(facts.declared)
        if server.settings_are_all
        and (server.has("--mlock") or "mlock" in server.flags.get("--load-mode", ""))
        and server.settings.get("LimitMEMLOCK") != "infinity"
    ]
    if servers:
        return Finding(
            f"{servers[0].path} locks its memory and LimitMEMLOCK is "
            f"{servers[0].settings.get('LimitMEMLOCK', 'the default, 8 MiB')}",
            about=f"--mlock of {servers[0].where}",
        )
    if limit is None or limit >= GIB:
        return None
    return Finding(
        f"you may lock only {format_size(limit)}: load_mode mlock would fail silently",
        "info",
        about="the caller's limit",
    )


def _group_limit(facts: Facts) -> Answer:
    limit = need(facts.paging).group_limit
    if limit is None:
        return None
    ram = _ram(facts)
    if limit < 0.9 * ram:
        return Finding(
            f"memory.max here is {format_size(limit)}: a mapped model counts against it, memory "
            "of the GPU does not",
            "info",
        )
    if limit > ram:
        return None
    return Finding(
        f"memory.max here is {format_size(limit)} of {format_size(ram)}: memory of the GPU comes "
        "on top, so the host runs out first"
    )


def _in_container(facts: Facts) -> bool:
    return facts.machine.boot_style == "none" or (need(facts.paging).group_limit is not None)


def _thp(facts: Facts) -> Answer:
    mode = need(need(facts.paging).thp or Unknown("this kernel has no transparent huge pages"))
    if mode != "madvise":
        return None
    return Finding(
        "transparent huge pages are set to madvise: llama.cpp requests none, so it gets none "
        "unless malloc does it"
    )


def _read_ahead(facts: Facts) -> Answer:
    disks = need(facts.paging).read_ahead
    if not disks:
        return Unknown("no NVMe disk was found")
    off = [name for name, size in disks.items() if size == 0]
    if off:
        return Finding(f"read-ahead of {', '.join(off)} is off: a mapped model loads page by page")
    small = {name: size for name, size in disks.items() if size <= 128}
    if not small:
        return None
    name, size = next(iter(small.items()))
    return Finding(
        f"read-ahead of {name} is {size} KiB: a cold model is read in small pieces, and "
        "fadvise reads no more than that per call",
        "info",
        "likely",
    )


def _overcommit(facts: Facts) -> Answer:
    mode = need(facts.paging).overcommit
    if need(Unknown("vm.overcommit_memory cannot be read") if mode is None else mode) != 2:
        return None
    return Finding("vm.overcommit_memory is 2: private mappings of a whole model are refused")


def _static_pages(facts: Facts) -> Answer:
    info = need(need(facts.paging).meminfo or Unknown("/proc/meminfo does not say"))
    total, free = info.get("HugePages_Total", 0), info.get("HugePages_Free", 0)
    size = info.get("Hugepagesize", 0)
    if free * size < GIB:
        return None
    return Finding(
        f"{free} of {total} static huge pages are unused: {format_size(free * size)} that nothing "
        "else can use, and llama.cpp uses none"
    )


def _killed(facts: Facts) -> Answer:
    kills = need(facts.paging).oom_kills
    if not kills:
        return None if kills == 0 else Unknown("/proc/vmstat does not count OOM kills here")
    noun = "process" if kills == 1 else "processes"
    return Finding(f"the kernel has killed {kills} {noun} for lack of memory since boot")


def _stalled(facts: Facts) -> Answer:
    share = need(facts.paging).stalled_percent
    if share is None:
        return Unknown("this kernel gives no pressure figures (PSI)")
    if share < 1:
        return None
    return Finding(f"in the last five minutes everything waited for memory {share:.1f} % of time")


def _fragmented(facts: Facts) -> Answer:
    blocks = need(facts.paging).free_huge_blocks
    if blocks is None:
        return Unknown("/proc/buddyinfo cannot be read")
    available = need(
        facts.machine.memory.available_bytes or Unknown("available memory is not known")
    )
    whole = blocks * 2 * MIB
    if available < 8 * GIB or whole >= available / 16:
        return None
    return Finding(
        f"of {format_size(available)} available only {format_size(whole)} are in blocks of 2 MiB: "
        "the driver compacts memory while it loads a model"
    )


def _no_swap(facts: Facts) -> Answer:
    swap = facts.machine.memory.swap_bytes
    if swap is None:
        return Unknown("/proc/meminfo does not say")
    if swap:
        return None
    return Finding("there is no swap: idle memory of the desktop cannot make room for a model")


RULES: tuple[Rule, ...] = (
    Rule(
        id="ttm-above-ram",
        title="the GPU may take more memory than there is",
        when=INTEGRATED,
        check=_limit_above_ram,
        severity="error",
        confidence="sure",
        fix="set ttm.pages_limit to RAM less what the system needs (infertune's profiles leave it)",
        sources=(linux("5dafdd649280", "July 2026"), rocm(6370)),
    ),
    Rule(
        id="ttm-close-to-ram",
        title="the GPU may take nearly all memory",
        when=INTEGRATED,
        check=_limit_close_to_ram,
        fix="leave a tenth of RAM, or 8 GiB where a desktop runs",
        sources=(github("superm1/amd-debug-tools", 10), rocm(6370)),
    ),
    Rule(
        id="ttm-default",
        title="the GPU may take only half of RAM",
        when=STRIX_HALO,
        check=_limit_is_default,
        severity="info",
        confidence="sure",
        fix="for larger models 'infertune boot stage long-context', and a reboot",
        sources=(github("ROCm/rocm-systems", 351),),
    ),
    Rule(
        id="gtt-above-ttm",
        title="the GTT size is larger than what TTM allows",
        when=INTEGRATED,
        check=_promised,
        confidence="sure",
        fix="remove amdgpu.gttsize, then 'infertune boot stage long-context'",
        sources=(
            github("unslothai/unsloth", 7960),
            github("kyuz0/amd-strix-halo-vllm-toolboxes", 11),
        ),
        covers=("gttsize-deprecated", "log-gtt-differs", "log-gttsize"),
    ),
    Rule(
        id="gpu-memory-held",
        title="programs that hold memory of the GPU",
        when=AMDGPU,
        check=_held,
        severity="info",
        confidence="sure",
        fix="stop what is not needed before a large model is loaded; 'infertune fit' counts it",
        sources=(rocm(5444), rocm(6370)),
    ),
    Rule(
        id="gpu-memory-next-boot",
        title="the next boot gives the GPU less memory",
        when=INTEGRATED,
        check=_next_boot,
        fix="'infertune boot stage long-context' makes a size last",
        sources=(github("ROCm/rocm-systems", 3978),),
    ),
    Rule(
        id="carveout-large",
        title="a large carve-out that Linux cannot use",
        when=INTEGRATED,
        check=_carveout_large,
        severity="info",
        confidence="sure",
        fix="set the firmware's smallest carve-out and size GTT instead, both: "
        "'infertune boot stage long-context' after the carve-out is small",
        sources=(github("kyuz0/amd-strix-halo-vllm-toolboxes", 81),),
    ),
    Rule(
        id="ttm-not-in-force",
        title="the TTM limit was changed after the driver had taken it",
        when=INTEGRATED,
        check=_not_taken_over,
        fix="set it at boot (modprobe.d and initramfs, or the command line), and reboot",
        sources=(github("ROCm/rocm-systems", 3978), rocm(5595)),
    ),
    Rule(
        id="carveout-wasted",
        title="memory carved out for the GPU that nothing uses",
        when=INTEGRATED,
        check=_carveout_wasted,
        fix="set the firmware's smallest carve-out and size GTT instead",
        sources=(
            github("ROCm/rocm-systems", 351),
            Source(
                "ROCm: RDNA 3.5 system optimization",
                "https://rocm.docs.amd.com/en/docs-7.14.0/reference/system-optimization/rdna3-5.html",
            ),
        ),
        covers=("ttm-default",),
    ),
    Rule(
        id="gpu-no-system-limit",
        title="amdgpu.no_system_mem_limit lets compute take all memory",
        when=AMDGPU,
        check=_no_system_limit,
        confidence="sure",
        fix="remove the option",
        sources=(kernel_doc("gpu/amdgpu/module-parameters"),),
    ),
    Rule(
        id="memlock-limit",
        title="memory cannot be locked",
        check=_locked,
        confidence="sure",
        fix="LimitMEMLOCK=infinity in the unit; on an integrated GPU no locking is needed at all",
        sources=(github("lemonade-sdk/lemonade", 1088),),
    ),
    Rule(
        id="container-limit",
        title="a container's memory limit, which the GPU's memory is not counted in",
        when=When("in a container", _in_container) & AMDGPU,
        check=_group_limit,
        fix="lower the container's limit by what the GPU may hold",
        sources=(llama(20472), rocm(6370)),
    ),
    Rule(
        id="thp-madvise",
        title="huge pages only on request, and llama.cpp requests none",
        check=_thp,
        severity="info",
        confidence="sure",
        fix="for a model on the CPU have malloc request them: malloc_hugetlb = true in [launch], "
        "or GLIBC_TUNABLES=glibc.malloc.hugetlb=1 for a server; weights in GTT are not affected",
        sources=(llama(22022), kernel_doc("admin-guide/mm/transhuge")),
    ),
    Rule(
        id="read-ahead",
        title="a disk with too little read-ahead, or none",
        check=_read_ahead,
        confidence="sure",
        fix="set queue/read_ahead_kb to 4096 (TuneD's accelerator-performance does); its effect on "
        "loading has not been measured here",
        sources=(kernel_doc("block/queue-sysfs"),),
    ),
    Rule(
        id="overcommit-strict",
        title="strict accounting refuses the mappings a model needs",
        check=_overcommit,
        fix="set vm.overcommit_memory to 0",
        sources=(kernel_doc("mm/overcommit-accounting"),),
    ),
    Rule(
        id="hugepages-unused",
        title="static huge pages that nobody uses",
        check=_static_pages,
        confidence="sure",
        fix="set vm.nr_hugepages to 0, and take hugepages= off the command line",
        sources=(kernel_doc("admin-guide/mm/hugetlbpage"),),
    ),
    Rule(
        id="oom-kills",
        title="processes were killed for lack of memory",
        check=_killed,
        confidence="sure",
        fix="give models less (context, --cache-ram, GTT), and see log-oom for who was killed",
        sources=(rocm(6370),),
    ),
    Rule(
        id="memory-stalls",
        title="the machine waits for memory",
        check=_stalled,
        fix="free memory, or give models less (context, --cache-ram)",
        sources=(kernel_doc("accounting/psi"),),
    ),
    Rule(
        id="memory-fragmented",
        title="free memory is fragmented",
        when=INTEGRATED,
        check=_fragmented,
        severity="info",
        fix="load models early after boot, or write 1 to /proc/sys/vm/compact_memory before",
        sources=(kernel_doc("admin-guide/sysctl/vm"),),
    ),
    Rule(
        id="swap-none",
        title="no swap",
        when=INTEGRATED,
        check=_no_swap,
        severity="info",
        fix="a few GiB of swap or zram let idle memory give way; the server itself needs none",
        sources=(kernel_doc("admin-guide/mm/concepts"),),
    ),
)
