# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks of the exporter measure on: a made-up machine, and real control groups.

The machine is the recorded one of the tests (32 CPUs, a GPU, an NPU, two servers) with as many
servers more as are asked for: files of their unit's control group, of their process, and a
declaration.  Its files are read as on a live machine, but from a disk or tmpfs: sysfs and procfs
cost more or less than that.
"""

from __future__ import annotations

import contextlib
import http.server
import os
import platform
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from infertune.host.snapshot import open_snapshot

REPOSITORY = Path(__file__).resolve().parents[1]
SNAPSHOT = REPOSITORY / "tests" / "golden" / "strix-halo-128-serving.snapshot"
SLICE = "sys/fs/cgroup/infertune.slice"
PID = 100_000
"""Of the first server that is added."""


def machine(base: Path, servers: int, port: int = 0) -> None:
    """Lay it out in ``base``.  ``port``: where all added servers answer, 0 for nowhere."""
    with open_snapshot(str(SNAPSHOT)) as recorded:
        shutil.copytree(recorded.base, base, symlinks=True, dirs_exist_ok=True)
    if not servers:
        return
    declarations = base / "etc/infertune/servers.d"
    for file in declarations.iterdir():
        file.unlink()  # nobody answers there
    for number in range(servers):
        unit = base / SLICE / f"infertune-server@made-up-{number}.service"
        shutil.copytree(base / SLICE / "infertune-server@gemma.service", unit)
        (unit / "cgroup.procs").write_text(f"{PID + number}\n")
        shutil.copytree(base / "proc/4242", base / f"proc/{PID + number}")
        if port:
            (declarations / f"made-up-{number}.toml").write_text(f"port = {port}\n")


@contextlib.contextmanager
def groups(count: int, *, busy: bool) -> Iterator[dict[int, str]]:
    """Real control groups: name by id.  In each a process; a busy one starts another a second."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    top = next(Path(mount[1]) for mount in mounts if mount[2] == "cgroup2")
    parent = top / f"infertune-benchmark-{os.getpid()}"
    parent.mkdir()
    processes: list[subprocess.Popen[bytes]] = []
    made: list[Path] = []
    script = 'echo $$ > "$0"; while sleep 1; do :; done' if busy else 'echo $$ > "$0"; sleep 0.01'
    try:
        for number in range(count):
            made.append(parent / str(number))
            made[-1].mkdir()
            command = ["sh", "-c", script, str(made[-1] / "cgroup.procs")]
            processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL))
            if not busy and len(processes) == 20:
                while processes:
                    processes.pop().wait()
        yield {group.stat().st_ino: f"made-up-{number}" for number, group in enumerate(made)}
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for group in [*made, parent]:
            for _ in range(50):  # the last sleep may be in it still
                with contextlib.suppress(OSError):
                    group.rmdir()
                    break
                time.sleep(0.1)


class _Llama(http.server.BaseHTTPRequestHandler):
    page = "".join(
        f"# HELP llamacpp:{name} What it is.\n# TYPE llamacpp:{name} {kind}\nllamacpp:{name} 12.5\n"
        for kind, names in {
            "counter": "prompt_tokens_total prompt_seconds_total tokens_predicted_total "
            "tokens_predicted_seconds_total n_decode_total",
            "gauge": "n_busy_slots_per_decode requests_processing requests_deferred n_tokens_max",
        }.items()
        for name in names.split()
    ).encode()

    props = b'{"build_info": "b11669-x", "model_alias": "m", "is_sleeping": false}'

    def do_GET(self) -> None:
        page = self.props if self.path == "/props" else self.page
        self.send_response(200)
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, *_: object) -> None:
        pass


class _Servers(http.server.ThreadingHTTPServer):
    request_queue_size = 128  # all are asked at once; real ones have a queue each

    def handle_error(self, request: object, client_address: object) -> None:
        """The exporter had no time left for it, or has ended."""


@contextlib.contextmanager
def llama() -> Iterator[int]:
    """The port where something answers as a llama-server does."""
    server = _Servers(("127.0.0.1", 0), _Llama)
    thread = threading.Thread(target=server.serve_forever, args=[0.1])
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def environment() -> str:
    """Where it was measured, in one line."""
    match = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    load = os.getloadavg()[1]
    return (
        f"Linux {platform.release()}, {match[1] if match else platform.machine()}, "
        f"{os.cpu_count()} CPUs, {time.strftime('%Y-%m-%d', time.gmtime())}, "
        f"Python {platform.python_version()}. The machine was shared with other work "
        f"(load {load:.1f} over five minutes)."
    )
