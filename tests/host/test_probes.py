# SPDX-License-Identifier: Apache-2.0
"""The probes on this kernel: what they count is what the kernel itself says."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import prometheus_client
import pytest

from infertune.bpf import btf
from infertune.bpf.object import Object
from infertune.exporter.probes import Probes, ProbeState
from probe_support import (
    COMPILED,
    DECLARED,
    NEEDED,
    cgroup,
    finish,
    probes,
    samples,
    start,
    until_asleep,
    value,
)

__all__ = ["cgroup", "probes"]  # fixtures

REPOSITORY = Path(__file__).parents[2]
NOBODY = 65534

pytestmark = NEEDED

TOUCH = """
import mmap, threading
def touch(pages):
    memory = mmap.mmap(-1, pages * 4096)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    for page in range(pages):
        memory[page * 4096] = 1
threads = [threading.Thread(target=touch, args=(4000,)) for _ in range(3)]
for each in threads: each.start()
for each in threads: each.join()
touch(8000)
"""


def test_faults_are_those_of_getrusage(probes: Probes, cgroup: Path) -> None:
    _, (minor, _) = finish(start(cgroup, TOUCH))
    counted = value(probes, "infertune_page_faults_total", server="test", kind="minor")
    assert minor > 20000
    assert counted == pytest.approx(minor, rel=0.01)


def test_faults_of_many_short_processes(probes: Probes, cgroup: Path) -> None:
    """Each ends between two collections; a probe that samples would miss them."""
    total = 0
    for _ in range(10):
        total += finish(start(cgroup, "memory = bytearray(2_000_000)"))[1][0]
    counted = value(probes, "infertune_page_faults_total", server="test", kind="minor")
    assert counted == pytest.approx(total, rel=0.01)


def test_faults_of_a_process_that_goes_on(probes: Probes, cgroup: Path) -> None:
    process = start(cgroup, TOUCH + "print('ready', flush=True)\ninput()")
    assert process.stdout
    assert process.stdin
    process.stdout.readline()
    stat = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    counted = value(probes, "infertune_page_faults_total", server="test", kind="minor")
    process.stdin.write("\n")
    finish(process)
    assert counted == pytest.approx(int(stat[7]), rel=0.01)
    final = value(probes, "infertune_page_faults_total", server="test", kind="minor")
    assert final >= counted


def test_what_was_before_is_not_counted(cgroup: Path) -> None:
    process = start(cgroup, TOUCH + "print('ready', flush=True)\ninput()")
    assert process.stdout
    assert process.stdin
    process.stdout.readline()
    until_asleep(process.pid)  # nothing of what it does before may come after
    inode = cgroup.stat().st_ino
    late = Probes(cgroups=lambda: {inode: "test"})
    try:
        late.attach()
        faults = value(late, "infertune_page_faults_total", server="test")
        running = value(late, "infertune_thread_seconds_total", server="test", state="running")
        process.stdin.write("\n")
        finish(process)
    finally:
        late.close()
    assert faults < 100  # it had more than 20000
    assert running < 0.005


def test_major_faults_of_a_cold_file(probes: Probes, cgroup: Path) -> None:
    file = REPOSITORY / "build" / f"cold-{os.getpid()}"  # /tmp may be memory
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(os.urandom(4096) * 4096)
    try:
        code = (
            "import mmap, os, sys\n"
            "fd = os.open(sys.argv[1], os.O_RDONLY)\n"
            "os.fsync(fd)\n"
            "os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)\n"
            "memory = mmap.mmap(fd, 0, prot=mmap.PROT_READ)\n"
            "memory.madvise(mmap.MADV_RANDOM)\n"  # no read-ahead
            "sum(memory[page * 4096] for page in range(4096))\n"
        )
        _, (minor, major) = finish(start(cgroup, code, str(file)))
    finally:
        file.unlink()
    if major < 1000:
        pytest.skip("pages of a file cannot be dropped from memory here")
    for kind, expected in (("major", major), ("minor", minor)):
        counted = value(probes, "infertune_page_faults_total", server="test", kind=kind)
        assert counted == pytest.approx(expected, rel=0.01)


KINDS = ("voluntary", "involuntary")
STATES = ("running", "waiting", "blocked")
SLEEP = """
import time
print('ready', flush=True)
input()
for _ in range(2000): time.sleep(0.0001)
end = time.thread_time() + 0.3
while time.thread_time() < end: pass
print('ready', flush=True)
input()
"""


def until_ready(stream: IO[str]) -> list[str]:
    """The lines before the line ``ready``, without empty ones."""
    lines = []
    for line in stream:
        if line == "ready\n":
            break
        lines.append(line)
    return [line for line in lines if line.strip()]


def asleep(process: subprocess.Popen[str]) -> list[int]:
    """What the kernel has counted of a process that has said it is ready and waits for us.

    Voluntary and involuntary switches, nanoseconds that it ran and that it was in a run queue.
    """
    assert process.stdout
    until_ready(process.stdout)
    proc = Path(f"/proc/{process.pid}")
    until_asleep(process.pid)
    status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    kinds = ("voluntary_ctxt_switches", "nonvoluntary_ctxt_switches")
    ran, waited, _ = (proc / "schedstat").read_text().split()
    return [*(int(status[kind]) for kind in kinds), int(ran), int(waited)]


def test_switches_and_times_are_the_kernel_s(probes: Probes, cgroup: Path) -> None:
    wanted = [
        *(("infertune_context_switches_total", "kind", kind) for kind in KINDS),
        *(("infertune_thread_seconds_total", "state", state) for state in STATES),
    ]

    def look() -> tuple[float, float, list[float]]:
        """The page, and between which two seconds it was read: a sleep goes on meanwhile."""
        began = time.monotonic()
        page = samples(probes)
        ended = time.monotonic()
        labels = [frozenset({("server", "test"), (key, word)}) for _, key, word in wanted]
        found = zip(wanted, labels, strict=True)
        return began, ended, [page[name, each] for (name, _, _), each in found]

    process = start(cgroup, SLEEP)
    assert process.stdin
    kernel = asleep(process)
    first_began, first_ended, before = look()
    process.stdin.write("\n")
    process.stdin.flush()
    kernel = [now - then for then, now in zip(kernel, asleep(process), strict=True)]
    second_began, second_ended, after = look()
    counted = [now - then for then, now in zip(before, after, strict=True)]
    process.stdin.write("\n")
    finish(process)
    assert kernel[0] > 1900  # a short sleep may be over before it began
    assert counted[:2] == kernel[:2]
    assert counted[2:4] == pytest.approx([ns / 1e9 for ns in kernel[2:]], rel=1e-6)
    assert second_began - first_ended < sum(counted[2:]) < second_ended - first_began


BUSY = """
import os, time
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
print('ready', flush=True)
input()
end = time.monotonic() + 0.7
while time.monotonic() < end: pass
print('ready', flush=True)
input()
"""


def waited_and_preempted(pid: int) -> tuple[int, int]:
    """Nanoseconds in a run queue, and switches that a process did not want."""
    status = Path(f"/proc/{pid}/status").read_text()
    [line] = [each for each in status.splitlines() if each.startswith("nonvoluntary")]
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]), int(line.split()[1])


def test_run_queue_latency_is_the_time_the_kernel_saw_waiting(probes: Probes, cgroup: Path) -> None:
    processes = [start(cgroup, BUSY) for _ in range(3)]
    looks = []
    for _ in ("before", "after"):
        for each in processes:
            assert each.stdout
            until_ready(each.stdout)
        for each in processes:  # both are read while all are asleep, so they speak of the same
            until_asleep(each.pid)
        looks.append((samples(probes), [waited_and_preempted(each.pid) for each in processes]))
        for each in processes:
            assert each.stdin
            each.stdin.write("\n")
            each.stdin.flush()
    for each in processes:
        finish(each)
    (old, before), (new, after) = looks
    found = {key: number - old.get(key, 0) for key, number in new.items()}
    waited = sum(now[0] - then[0] for then, now in zip(before, after, strict=True)) / 1e9
    preempted = sum(now[1] - then[1] for then, now in zip(before, after, strict=True))
    assert waited > 0.5, "three processes on one CPU must wait"
    assert preempted > 10
    counted = sum(
        number
        for (n, labels), number in found.items()
        if n == "infertune_context_switches_total"
        and {("server", "test"), ("kind", "involuntary")} <= labels
    )
    assert counted == pytest.approx(preempted, rel=0.05, abs=5)
    name, label = "infertune_run_queue_latency_seconds", ("server", "test")
    total = found[f"{name}_sum", frozenset({label})]
    count = found[f"{name}_count", frozenset({label})]
    buckets = {
        dict(labels)["le"]: number
        for (n, labels), number in found.items()
        if n == f"{name}_bucket" and label in labels
    }
    assert total == pytest.approx(waited, rel=0.05)
    assert buckets["+Inf"] == count > 0
    ordered = [buckets[le] for le in sorted(buckets, key=float)]
    assert ordered == sorted(ordered)
    # Each bound is inclusive: what lies in all finite buckets cannot sum up to more.
    bounds = sorted(float(le) for le in buckets)
    upper = lower = 0.0
    for low, high, below, number in zip(
        [0.0, *bounds], bounds, [0.0, *ordered], ordered, strict=False
    ):
        upper += (number - below) * high if number > below else 0.0
        lower += (number - below) * low
    assert lower <= total <= upper


def test_migrations_are_the_kernel_s(probes: Probes, cgroup: Path) -> None:
    if len(os.sched_getaffinity(0)) < 2 or not Path("/proc/self/sched").exists():
        pytest.skip("one CPU, or no /proc/PID/sched")
    code = (
        "import os\n"
        "cpus = sorted(os.sched_getaffinity(0))[:2]\n"
        "for n in range(200): os.sched_setaffinity(0, {cpus[n % 2]})\n"
        "[line] = [l for l in open('/proc/self/sched') if 'nr_migrations' in l]\n"
        "print(line.split(':')[1])\n"
    )
    migrations = int(finish(start(cgroup, code))[0])
    assert migrations >= 190
    counted = value(probes, "infertune_thread_migrations_total", server="test")
    assert counted == pytest.approx(migrations, abs=2)


@pytest.fixture
def small_memory(cgroup: Path) -> Iterator[Path]:
    """The file of tasks of a memory control group with 32 MiB (v2, or v1 beside our group)."""
    v1 = Path("/sys/fs/cgroup/memory")
    if (cgroup / "memory.max").exists():
        (cgroup / "memory.max").write_text(str(32 << 20))
        yield cgroup / "cgroup.procs"
        return
    group = v1 / cgroup.name
    if not (v1 / "memory.limit_in_bytes").exists():
        pytest.skip("no memory control group can be made here")
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text(str(32 << 20))
    yield group / "cgroup.procs"
    for _ in range(50):
        with contextlib.suppress(OSError):
            group.rmdir()
            return
        time.sleep(0.1)


def test_reclaim_in_a_small_group(probes: Probes, cgroup: Path, small_memory: Path) -> None:
    file = REPOSITORY / "build" / f"large-{os.getpid()}"
    file.parent.mkdir(exist_ok=True)
    code = (
        "import os, sys\n"
        "open(sys.argv[1], 'w').write('0')\n"
        "fd = os.open(sys.argv[2], os.O_RDWR | os.O_CREAT)\n"
        "for _ in range(128): os.write(fd, bytes(1 << 20))\n"
        "os.fsync(fd)\n"
        "os.lseek(fd, 0, 0)\n"
        "while os.read(fd, 1 << 20): pass\n"
    )
    try:
        finish(start(cgroup, code, str(small_memory), str(file)))
    finally:
        file.unlink(missing_ok=True)
    labels = {"server": "test", "limit": "cgroup"}
    assert value(probes, "infertune_direct_reclaim_seconds_count", **labels) > 10
    seconds = value(probes, "infertune_direct_reclaim_seconds_sum", **labels)
    assert 0 < seconds < 60
    # 128 MiB went through 32 MiB, so at least half of them had to go again.
    assert value(probes, "infertune_direct_reclaimed_bytes_total", **labels) > 64 << 20


def test_who_makes_room_for_others_is_not_stalled(
    probes: Probes, cgroup: Path, small_memory: Path
) -> None:
    """Lowering a limit reclaims memory of others; compacting on purpose is not waiting."""
    limits = ("memory.max", "memory.limit_in_bytes")
    [limit] = [
        small_memory.with_name(name) for name in limits if small_memory.with_name(name).exists()
    ]
    file = REPOSITORY / "build" / f"cached-{os.getpid()}"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(bytes(24 << 20))
    fill = (
        "import os, sys\n"
        f"open({str(small_memory)!r}, 'w').write('0')\n"
        "fd = os.open(sys.argv[1], os.O_RDONLY)\n"
        "os.fsync(fd)\n"
        "os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)\n"
        "while os.read(fd, 1 << 20): pass\n"
    )
    lower = f"open({str(limit)!r}, 'w').write(str(8 << 20))\n"
    compact = "open('/proc/sys/vm/compact_memory', 'w').write('1')\n"
    before = events("compact_migrate_scanned")
    try:
        subprocess.run([sys.executable, "-S", "-c", fill, str(file)], check=True)
        finish(start(cgroup, lower + compact))
    finally:
        file.unlink()
    assert int(limit.read_text()) == 8 << 20
    assert events("compact_migrate_scanned") != before
    for name in ("direct_reclaim", "compaction_stall"):
        assert value(probes, f"infertune_{name}_seconds_count", server="test") == 0


def events(*names: str) -> dict[str, int]:
    """Counters of /proc/vmstat."""
    rows = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return {name: int(rows[name]) for name in names}


# -- life and death --------------------------------------------------------------------


def loaded_programs() -> dict[int, str]:
    """All BPF programs in the kernel: number, which is never used again, and name."""
    lib = ctypes.CDLL("libbpf.so.1")
    found, number = {}, ctypes.c_uint32(0)
    while lib.bpf_prog_get_next_id(number, ctypes.byref(number)) == 0:
        fd = lib.bpf_prog_get_fd_by_id(number)
        if fd < 0:
            continue
        info, size = ctypes.create_string_buffer(256), ctypes.c_uint32(256)
        lib.bpf_obj_get_info_by_fd(fd, info, ctypes.byref(size))
        found[number.value] = info.raw[64:80].partition(b"\0")[0].decode()  # bpf_prog_info.name
        os.close(fd)
    return found


def eventually(condition: Callable[[], bool]) -> bool:
    for _ in range(600):
        if condition():
            return True
        time.sleep(0.1)
    return False


HOLD = """
import sys
from infertune.exporter.probes import Probes
probes = Probes()
print([s.state for s in probes.attach()], flush=True)
input()
"""


def test_kill_leaves_nothing_behind() -> None:
    before = loaded_programs()
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "daemon")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout
    assert child.stdin
    assert "attached" in child.stdout.readline()
    ours = {n: name for n, name in loaded_programs().items() if n not in before}
    assert {"context_switch", "direct_begin", "zone_end"} <= set(ours.values())
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    child.stdin.close()
    assert eventually(lambda: not set(loaded_programs()) & set(ours))


def test_close_leaves_nothing_behind() -> None:
    before = loaded_programs()
    probes = Probes()
    probes.attach()
    ours = set(loaded_programs()) - set(before)
    assert ours
    probes.close()
    assert eventually(lambda: not set(loaded_programs()) & ours)
    assert not probes.states()


def copied(tmp_path: Path) -> Path:
    """Declarations and compiled programs in a directory of their own."""
    for path in [*DECLARED.glob("*.toml"), *COMPILED.glob("*.bpf.o")]:
        shutil.copy(path, tmp_path)
    return tmp_path


def attached(directory: Path) -> dict[str, ProbeState]:
    probes = Probes(directory)
    try:
        return {state.name: state for state in probes.attach()}
    finally:
        probes.close()


def test_a_missing_tracepoint_costs_only_its_probe(tmp_path: Path) -> None:
    file = copied(tmp_path) / "reclaim.toml"
    file.write_text(file.read_text().replace("mm_vmscan_direct_reclaim_end", "mm_vmscan_gone"))
    states = attached(tmp_path)
    assert states["reclaim"].state == "absent"
    assert "mm_vmscan_gone" in states["reclaim"].why
    assert states["page_faults"].state == states["compaction"].state == "attached"


def test_a_missing_object_costs_only_its_probe(tmp_path: Path) -> None:
    (copied(tmp_path) / "reclaim.bpf.o").unlink()
    states = attached(tmp_path)
    assert states["reclaim"].state == "failed"
    assert "clang" in states["reclaim"].why
    assert states["page_faults"].state == "attached"


def test_a_damaged_object_costs_only_its_probe(tmp_path: Path) -> None:
    file = copied(tmp_path) / "reclaim.bpf.o"
    file.write_bytes(file.read_bytes()[:1000])
    states = attached(tmp_path)
    assert states["reclaim"].state == "failed"
    assert "format invalid" in states["reclaim"].why  # libbpf's own word for it
    assert states["page_faults"].state == "attached"


def test_a_declaration_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    file = copied(tmp_path) / "reclaim.toml"
    file.write_text(file.read_text().replace('value = "pages"', 'value = "sheets"'))
    states = attached(tmp_path)
    assert states["reclaim"].state == "failed"
    assert "sheets" in states["reclaim"].why


def test_what_is_not_a_module_here_stays_absent(probes: Probes) -> None:
    if Path("/sys/kernel/btf/gpu_sched").exists():
        pytest.skip("this machine has a GPU scheduler")
    states = {state.name: state.state for state in probes.retry()}
    assert states["drm_scheduler"] == "absent"
    assert not [n for n, _ in samples(probes) if n.startswith("infertune_drm")]


def types_of_a_scheduler(base: bytes) -> bytes:
    """BTF as gpu_sched has it, with the fields that the probe reads, on top of this kernel's."""
    number, offset = len(btf.Types(base)._types) - 1, btf._header(base).strings_size
    names, types = b"\0", b""

    def name(text: str) -> int:
        nonlocal names
        names += text.encode() + b"\0"
        return offset + len(names) - len(text) - 1

    types += struct.pack("<III", 0, 2 << 24, 0)  # 1: void *
    for called, size, members in (
        ("dma_fence", 64, []),  # 2: in the kernel's own types with all its fields
        ("drm_sched_fence", 128, [("finished", 2, 64)]),
        ("drm_gpu_scheduler", 24, [("name", 1, 8), ("dev", 1, 16)]),
        ("drm_sched_job", 24, [("sched", 1, 8), ("s_fence", 1, 16)]),
    ):
        types += struct.pack("<III", name(called), 4 << 24 | len(members), size)
        for member, kind, at in members:
            types += struct.pack("<III", name(member), number + kind, 8 * at)
    header = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(names))
    return btf.join(base, header + types + names)


@pytest.mark.parametrize("generation", [("job_queue", "job_run"), ("job_queue_616", "job_run_616")])
def test_the_verifier_takes_the_programs_of_the_scheduler(generation: tuple[str, ...]) -> None:
    """Also here, where there is no such module; the end of a job is told by any kernel."""
    types = Path("/sys/kernel/btf/vmlinux").read_bytes()
    if b"btf_trace_dma_fence_signaled" not in types:
        pytest.skip("this kernel has no fences (CONFIG_DMA_SHARED_BUFFER)")
    path = COMPILED / "drm_scheduler.bpf.o"
    with Object(path, btf=types_of_a_scheduler(types)) as programs:
        programs.load({*generation, "fence_signaled"})
        programs.attach("fence_signaled")


def test_a_probe_that_could_not_be_read_is_tried_again(
    probes: Probes, monkeypatch: pytest.MonkeyPatch
) -> None:
    visit = Object.visit

    def refuse(self: Object, name: str) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), name)

    def state() -> ProbeState:
        [found] = [each for each in probes.states() if each.name == "page_faults"]
        return found

    monkeypatch.setattr(Object, "visit", refuse)
    left = {name for name, _ in samples(probes)}
    assert state().state == "failed"
    assert "Cannot allocate memory" in state().why
    assert "infertune_page_faults_total" not in left
    assert "infertune_direct_reclaim_seconds_count" in left
    monkeypatch.setattr(Object, "visit", visit)
    assert "infertune_page_faults_total" in {name for name, _ in samples(probes)}
    assert (state().state, state().why) == ("attached", "")


def test_own_cost_is_known_only_while_it_is_measured(probes: Probes) -> None:
    sysctl = Path("/proc/sys/kernel/bpf_stats_enabled")
    if sysctl.read_text().strip() != "0":
        pytest.skip("somebody measures BPF programs here")
    assert not [n for n, _ in samples(probes) if n == "infertune_probe_runs_total"]
    sysctl.write_text("1")
    try:
        time.sleep(0.2)
        labels = {"probe": "context_switches", "program": "context_switch"}
        assert value(probes, "infertune_probe_runs_total", **labels) > 0
        assert value(probes, "infertune_probe_run_seconds_total", **labels) > 0
    finally:
        sysctl.write_text("0")


def test_in_a_pid_namespace_of_its_own_it_says_so() -> None:
    code = "from infertune.exporter.probes import Probes\nfor s in Probes().attach(): print(s)"
    done = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "daemon")},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.stderr.startswith("unshare: "):  # not allowed, or / of a chroot, which is no mount
        pytest.skip(done.stderr.strip())
    assert done.stdout.count("not applicable") == done.stdout.count("PID namespace of its own") >= 4


# -- without root ----------------------------------------------------------------------

DROP = """
import ctypes, os, struct, sys
from infertune.exporter.probes import Probes
probes = Probes()
states = {s.name: s for s in probes.attach()}
print({name: s.state for name, s in states.items() if name != 'drm_scheduler'})
print(states['page_faults'].why)
libc = ctypes.CDLL(None)
libc.prctl(47, 4, 0, 0, 0)  # PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL
assert libc.capset(struct.pack('II', 0x20080522, 0), bytes(24)) == 0
[line] = [l for l in open('/proc/self/status') if l.startswith('CapEff')]
assert int(line.split()[1], 16) == 0
names = {s.metric for s in probes.samples() if s.value}
print(sorted(names))
print(os.geteuid(), {s.name: s.state for s in probes.retry() if s.name != 'drm_scheduler'})
"""


def as_nobody(*capabilities: str) -> str:
    """What DROP prints as a user who has these capabilities only."""
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv is not installed")
    words = ",".join(["-all", *(f"+{each}" for each in capabilities)])
    user = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    user += [f"--inh-caps={words}", f"--ambient-caps={words}"]
    libraries = Path(prometheus_client.__file__).parents[1]
    environment = {"PATH": os.defpath, "PYTHONPATH": f"{REPOSITORY / 'daemon'}:{libraries}"}
    # The interpreter of the tests may be in somebody's home directory.
    for python in (sys.executable, "/usr/bin/python3"):
        done = subprocess.run(
            [*user, python, "-c", "import infertune.exporter.probes"],
            env=environment,
            capture_output=True,
            check=False,
        )
        if done.returncode == 0:
            break
    else:
        pytest.skip("another user may not read this checkout, or its Python")
    done = subprocess.run(
        [*user, python, "-c", DROP], env=environment, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def test_two_capabilities_are_enough_and_none_to_read() -> None:
    printed = as_nobody("bpf", "perfmon")
    assert printed.count("attached") == 8, printed  # four probes, before and after
    for name in ("page_faults", "thread_seconds", "context_switches"):
        assert f"infertune_{name}_total" in printed
    assert str(NOBODY) in printed


def test_without_capabilities_it_says_so() -> None:
    printed = as_nobody()
    assert "attached" not in printed
    assert "CAP_BPF and CAP_PERFMON missing" in printed


# -- a second opinion ------------------------------------------------------------------


BPFTRACE = """
mountpoint -q /sys/kernel/tracing || mount -t tracefs none /sys/kernel/tracing
mountpoint -q /sys/kernel/debug || mount -t debugfs none /sys/kernel/debug
exec bpftrace -e "$1"
"""


def test_bpftrace_counts_the_same(probes: Probes, cgroup: Path) -> None:
    if shutil.which("bpftrace") is None or shutil.which("unshare") is None:
        pytest.skip("bpftrace is not installed")
    code = "input()\nimport time\nfor _ in range(3000): time.sleep(0.0001)\n" + TOUCH
    process = start(cgroup, code)
    assert process.stdin
    script = (
        'BEGIN { printf("ready\\n"); } '
        f"tracepoint:sched:sched_switch /pid == {process.pid}/ {{ @s = count(); }} "
        f"software:page-faults:1 /pid == {process.pid}/ {{ @f = count(); }}"
    )
    with subprocess.Popen(
        ["unshare", "-m", "sh", "-c", BPFTRACE, "sh", script],  # mounts of its own
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as other:
        assert other.stdout
        said = until_ready(other.stdout)
        before = samples(probes)
        process.stdin.write("\n")
        finish(process)
        after = samples(probes)
        other.send_signal(signal.SIGINT)
        printed = other.stdout.read()
    if "@s:" not in printed:
        pytest.skip(f"bpftrace cannot attach here: {' '.join(said)[-200:]}")

    def growth(name: str) -> float:
        ours = [key for key in after if key[0] == name and ("server", "test") in key[1]]
        return sum(after[key] - before.get(key, 0) for key in ours)

    theirs = {name: int(printed.split(f"@{name}:")[1].split()[0]) for name in "sf"}
    assert theirs["f"] > 20000
    assert growth("infertune_context_switches_total") == pytest.approx(theirs["s"], rel=0.02)
    assert growth("infertune_page_faults_total") == pytest.approx(theirs["f"], rel=0.01)
