# SPDX-License-Identifier: Apache-2.0
"""What this machine is: to read, to paste into a report, to take along as a file."""

from __future__ import annotations

import os

from infertune.base.errors import Exit, Failed, UsageError
from infertune.base.records import asdict, replace
from infertune.base.root import Root, write_user_file
from infertune.base.units import GIB, MIB, PAGES_PER_GIB, format_cpulist, format_size
from infertune.boot.sizes import look
from infertune.catalogue.knobs import KNOBS, read_live, targets
from infertune.cli.base import JSON, Context, argument, verb
from infertune.cli.render import counted
from infertune.doctor.facts import read_facts
from infertune.doctor.surroundings import FILE as SURROUNDINGS
from infertune.doctor.surroundings import Surroundings, look_around, recorded
from infertune.engine.documents import picture_document
from infertune.host import kernel_log
from infertune.host.boot_loader import STACKS
from infertune.host.cgroup import Cgroup
from infertune.host.cpu import Cpu
from infertune.host.gpu import Ttm, screens
from infertune.host.machine import Gpu, Machine, read_machine
from infertune.host.memory import Memory
from infertune.host.snapshot import record, redact_cmdline
from infertune.host.system import boot_id
from infertune.host.unknown import Unknown
from infertune.pools.judge import Picture, held_by

UNKNOWN = "unknown"


def show_machine(context: Context) -> int:
    machine = read_machine(context.root)
    if machine.cmdline:
        # Made to be pasted somewhere, so the same rule as for a snapshot.
        machine = replace(machine, cmdline=redact_cmdline(machine.cmdline))
    found = look(context.root, machine)
    if context.args.json:
        gpu = machine.inference_gpu
        document = asdict(machine) | {
            "inference_gpu": gpu.path if gpu else None,
            "gpu_memory": picture_document(found),
        }
        context.print_json("infertune.machine/1", document)
        return Exit.DONE
    context.labelled(_summary(machine, found))
    return Exit.DONE


def _summary(machine: Machine, found: Picture) -> list[tuple[str, str]]:
    """Label and text per line; an empty label continues the one above."""
    dmi = machine.dmi
    running = [tuner.name for tuner in machine.tuners if tuner.running]
    idle = [tuner.name for tuner in machine.tuners if not tuner.running]
    how = next((stack.how for stack in STACKS if stack.id == machine.boot_style), None)
    return [
        ("machine", _known(dmi.vendor, dmi.product)),
        ("board", _known(dmi.board)),
        ("firmware", _known(dmi.bios_version, dmi.bios_date)),
        ("system", _known(machine.distro)),
        ("kernel", _known(machine.kernel)),
        ("command line", _known(machine.cmdline)),
        ("boot style", f"{machine.boot_style}: {how}" if machine.boot_style else UNKNOWN),
        *(("", each) for each in machine.boot_evidence),
        *_cpu(machine.cpu),
        *_memory(machine.memory),
        *(line for gpu in machine.gpus for line in _gpu(gpu)),
        *([] if machine.gpus else [("GPU", "none")]),
        *(_gpu_memory(machine, found) if machine.inference_gpu else []),
        ("TTM", _ttm(machine.ttm)),
        ("compute", "KFD (ROCm can run)" if machine.kfd else "no KFD (ROCm cannot run)"),
        ("NPU", machine.npu or "none, or without a driver"),
        *_cgroup(machine.cgroup),
        ("tuners", f"running: {', '.join(running) or 'none'}"),
        *([("", f"installed, not running: {', '.join(idle)}")] if idle else []),
    ]


def _known(*parts: str | None) -> str:
    return " ".join(part for part in parts if part) or UNKNOWN


def _size(size: int | None) -> str:
    return UNKNOWN if size is None else format_size(size)


def _cpu(cpu: Cpu) -> list[tuple[str, str]]:
    if not cpu.cores:
        return [("CPU", _known(cpu.model))]
    groups = {core.l3 for core in cpu.cores if core.l3 is not None}
    shape = [counted(len(cpu.cores), "core"), counted(len(cpu.online), "thread")]
    kinds = [core.kind for core in cpu.cores if core.kind]
    if kinds:
        shape.append(" + ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)))
    lines = [("CPU", _known(cpu.model)), ("", ", ".join(shape))]
    for group in sorted(groups):
        cpus = format_cpulist(c for core in cpu.cores if core.l3 == group for c in core.cpus)
        lines.append(("", f"L3 group: CPUs {cpus}"))
    status = f", amd_pstate {cpu.amd_pstate}" if cpu.amd_pstate else ""
    lines.append(("frequency", f"{cpu.scaling_driver or 'no cpufreq driver'}{status}"))
    return lines


def _memory(memory: Memory) -> list[tuple[str, str]]:
    nodes = UNKNOWN if memory.numa_nodes is None else counted(memory.numa_nodes, "NUMA node")
    lines = [
        ("memory", f"{_size(memory.total_bytes)}, {_size(memory.available_bytes)} available"),
        ("", f"swap {_size(memory.swap_bytes)}, {nodes}"),
    ]
    if memory.cma_total_bytes:
        lines.append(
            ("", f"CMA {_size(memory.cma_total_bytes)}, {_size(memory.cma_free_bytes)} free")
        )
    if memory.gpu_active_bytes is not None:
        lines.append(("", f"held by the GPU: {_size(memory.gpu_active_bytes)}"))
    return lines


def _gpu(gpu: Gpu) -> list[tuple[str, str]]:
    kind = {True: "integrated", False: "discrete", None: None}[gpu.integrated]
    facts = [gpu.pci_id or UNKNOWN, f"driver {gpu.driver or 'none'}", gpu.gfx_target, kind]
    lines = [
        ("GPU", gpu.name or "name unknown"),
        ("", ", ".join(fact for fact in facts if fact)),
    ]
    if gpu.driver == "amdgpu":
        memory = "carve-out" if gpu.integrated else "VRAM"
        lines.append(("", f"{memory} {_size(gpu.vram_bytes)}, GTT limit {_size(gpu.gtt_bytes)}"))
    if gpu.carveout_options:
        lines.append(("", f"firmware carve-out: {gpu.carveout or UNKNOWN}"))
        lines.append(("", f"on offer: {', '.join(gpu.carveout_options)}"))
    return lines


def _gpu_memory(machine: Machine, found: Picture) -> list[tuple[str, str]]:
    """What models can have of it: the judge's answer, and nobody else's."""
    now = found.now
    if isinstance(now, Unknown):
        return [("GPU memory", f"{UNKNOWN}: {now.why}")]
    lines = [("GPU memory", f"{format_size(now.bytes)} ({now.name}): {now.limit.why}")]
    if now.held is None:
        lines.append(("", f"in use: {UNKNOWN}"))
    else:
        who = f": {held_by(now)}" if now.holders else ""
        lines.append(("", f"{format_size(now.held)} in use{who}"))
    if machine.kfd and not isinstance(found.rocm, Unknown) and found.rocm.bytes != now.bytes:
        lines.append(("", f"for ROCm {format_size(found.rocm.bytes)}: {found.rocm.limit.why}"))
    then = found.next_boot
    if isinstance(then, Unknown):
        lines += [("", f"after the next boot {UNKNOWN}: {then.why}")] if now.in_ram else []
    else:
        same = abs(then.bytes - now.bytes) < 64 * MIB
        text = "the same" if same else f"{format_size(then.bytes)} ({then.name}): {then.limit.why}"
        lines.append(("", f"after the next boot {text}"))
    return lines


def _ttm(ttm: Ttm | None) -> str:
    if ttm is None:
        return "none that amdgpu could hold"
    pages = ttm.pages_limit
    limit = UNKNOWN if pages is None else format_size(pages * (GIB // PAGES_PER_GIB))
    doubt = "" if ttm.sure else " (a guess: several are loaded)"
    return f"{ttm.module}{doubt}, pages_limit {limit}"


def _cgroup(cgroup: Cgroup) -> list[tuple[str, str]]:
    if cgroup.version is None:
        return [("cgroup", "none mounted")]
    lines = [("cgroup", f"v{cgroup.version}")]
    if cgroup.mount:
        offered = " ".join(cgroup.controllers) or "no controllers"
        lines.append(("", f"v2 on {cgroup.mount}: {offered}"))
    return lines


def save_snapshot(context: Context) -> int:
    file = context.args.file
    if file == "-" and context.args.json:
        raise UsageError("'-' and --json would both print", hint="give a file name with --json")
    text = _record(context.root)
    if file == "-":
        context.stdout.write(text)
        return Exit.DONE
    data = text.encode()
    try:
        write_user_file(file, data, force=context.args.force)
    except FileExistsError as error:
        raise UsageError(f"{file}: exists already", hint="use --force to replace it") from error
    except OSError as error:
        raise Failed(f"{file}: {error.strerror}") from error
    entries = sum(text.count(f"\n{key}: ") for key in ("Path", "Directory"))
    if context.args.json:
        document = {"file": file, "entries": entries, "bytes": len(data)}
        context.print_json("infertune.snapshot/1", document)
    else:
        held = counted(entries, "file and directory", "files and directories")
        context.print(f"{file}: {held}, {format_size(len(data))}")
        context.print("Plain text: review it before you send it to anyone.")
    return Exit.DONE


def _record(root: Root) -> str:
    """All that any verb may want to know of a recorded machine."""
    around = look_around(root, os.environ) if root.live else recorded(root)
    more = {}
    if root.live or root.exists(SURROUNDINGS):
        more[SURROUNDINGS] = around.to_file()
    if around.journal is not None:
        more["/dev/kmsg"] = kernel_log.records(around.journal)

    def read(recorder: Root) -> None:
        _read_everything(recorder, around)

    return record(root, read, more)


def _read_everything(root: Root, around: Surroundings) -> None:
    machine = read_machine(root)
    read_facts(root, around, machine=machine)
    for knob in KNOBS.values():
        read_live(root, targets(root, machine, knob))
    boot_id(root)
    screens(root)


COMMANDS = (
    verb(
        "machine",
        show_machine,
        (JSON,),
        "Shows the facts profiles are resolved against: CPU, memory, GPU with carve-out and GTT "
        "limit, kernel, boot style, cgroups, and the other tuners that run. Needs no privileges. "
        "What cannot be read is said to be unknown.",
    ),
    verb(
        "snapshot",
        save_snapshot,
        (
            argument("file", metavar="FILE", help="file to write; '-' prints it"),
            argument("--force", action="store_true", help="replace an existing file"),
            JSON,
        ),
        "Writes every file that the facts and the knobs read into one reviewable text file, which "
        "--root replays. Serial numbers, MAC addresses, UUIDs, the host name, and values on the "
        "kernel command line that are not about hardware or tuning are left out. As root it "
        "holds more: /dev/cpu_dma_latency can be read by root only.",
    ),
)
