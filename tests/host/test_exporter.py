# SPDX-License-Identifier: Apache-2.0
"""infertune-exporter on this kernel: its page, its privileges, its life, and a real Prometheus."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from infertune.exporter.collectors import COLLECTORS
from infertune.host.snapshot import open_snapshot

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY / "daemon")}
Start = Callable[..., tuple[subprocess.Popen[bytes], int]]
RECORDED = REPOSITORY / "tests" / "golden" / "strix-halo-128-serving.snapshot"
GENEROUS_S = 120
"""Far more than anything here takes on a busy machine."""
EXPORTER = [sys.executable, "-B", "-m", "infertune.exporter.main"]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def get(port: int, path: str = "/metrics") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=GENEROUS_S)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def until(true: Callable[[], bool], seconds: float = GENEROUS_S) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError, http.client.HTTPException, KeyError, ValueError):
            if true():
                return True
        time.sleep(0.1)
    return False


@pytest.fixture
def start() -> Iterator[Start]:
    """Start an exporter on a port of its own and wait until it answers."""
    running: list[subprocess.Popen[bytes]] = []

    def begin(*words: str, port: int = 0) -> tuple[subprocess.Popen[bytes], int]:
        port = port or free_port()
        process = subprocess.Popen(
            [*EXPORTER, "--listen", f"127.0.0.1:{port}", *words],
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
        )
        running.append(process)
        assert until(lambda: get(port, "/-/healthy")[0] == 200)
        return process, port

    yield begin
    for process in running:
        process.kill()
        process.wait()


def test_once_on_this_machine() -> None:
    done = subprocess.run([*EXPORTER, "--once"], env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    families = {family.name for family in text_string_to_metric_families(done.stdout)}
    assert "infertune_knob_files" in families
    assert 'state="failed"} 1.0' not in done.stdout
    if promtool := shutil.which("promtool"):
        checked = subprocess.run([promtool, "check", "metrics"], input=done.stdout, text=True)
        assert checked.returncode == 0


def test_every_capability_is_given_up(
    start: Start,
) -> None:
    process, port = start()
    get(port)  # a worker and a client's thread are there now
    seen = 0
    for task in list(Path(f"/proc/{process.pid}/task").iterdir()):
        try:
            text = (task / "status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue  # the client's thread has ended meanwhile
        seen += 1
        status = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
        for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
            assert int(status[name], 16) == 0, (task.name, name)
        if os.geteuid() == 0:
            assert int(status["CapBnd"], 16) == 0
        assert status["NoNewPrivs"] == "1"
    assert seen > 1


def cost(pid: int) -> tuple[int, int, int]:
    """Descriptors, threads and resident memory (KiB) of a process."""
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    descriptors = len(os.listdir(f"/proc/{pid}/fd"))
    return descriptors, int(status["Threads"]), int(status["VmRSS"].split()[0])


ON_A_TREE = """
import sys
from infertune.exporter import web, webconfig
from infertune.exporter.page import Page
from infertune.base.root import Root
listener = web.listening_socket("127.0.0.1:0")
print(listener.getsockname()[1], flush=True)
web.Server(listener, webconfig.WebConfig(), Page(Root(sys.argv[1])), None).serve_forever(3600)
"""


def proportional(pid: int) -> int:
    """Proportional set size of a process, in KiB."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))


def test_a_thousand_scrapes_while_profiles_are_switched(tmp_path: Path) -> None:
    """On a machine in a directory: its profiles are really applied and reverted meanwhile."""
    with open_snapshot(str(RECORDED)) as recorded:
        shutil.copytree(recorded.base, tmp_path / "machine", symlinks=True)
    tree = str(tmp_path / "machine")
    process = subprocess.Popen(
        [sys.executable, "-B", "-c", ON_A_TREE, tree], env=ENVIRONMENT, stdout=subprocess.PIPE
    )
    assert process.stdout
    port = int(process.stdout.readline())
    shown = ""  # the profile of the last page

    def infertune(*words: str) -> None:
        command = [sys.executable, "-B", "-m", "infertune", "--root", tree, *words]
        called = subprocess.run(command, env=ENVIRONMENT, capture_output=True, check=False)
        assert called.returncode == 0, (words, called.stdout, called.stderr)

    def switch() -> None:
        """Two rounds; each step waits until a page shows it, however fast either side is."""
        for _ in range(2):
            for profile in ("long-context", "low-latency", ""):
                infertune(*(("apply", profile) if profile else ("revert",)))
                assert until(lambda profile=profile: shown == profile), profile  # type: ignore[misc]

    def scrape(number: int) -> None:
        nonlocal shown
        status, text = get(port)
        assert status == 200
        assert 'state="failed"} 1' not in text
        shown = ",".join(re.findall(r'infertune_profile_info{.*profile="([a-z-]*)".*} 1', text))
        # The library takes longer to read a page than all the rest: most are read by eye only.
        if number % 50 == 0:
            found = {s.name for f in text_string_to_metric_families(text) for s in f.samples}
            assert len(found) > 50

    try:
        with ThreadPoolExecutor(20) as clients:
            list(clients.map(scrape, range(100)))
        assert until(lambda: cost(process.pid)[1] <= 2)
        before, memory = cost(process.pid), proportional(process.pid)
        with ThreadPoolExecutor(1) as switcher, ThreadPoolExecutor(20) as clients:
            switching = switcher.submit(switch)
            scrapes = 0
            while scrapes < 1000 or not switching.done():
                list(clients.map(scrape, range(scrapes, scrapes + 100)))
                scrapes += 100
            switching.result()
        assert until(lambda: cost(process.pid)[:2] <= before[:2])
        # What threads that serve at once need is there already; it does not grow with scrapes.
        assert proportional(process.pid) < memory + 4 * 1024
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_thousand_scrapes_of_twenty_clients(start: Start, thorough: bool) -> None:
    process, port = start()
    for _ in range(5):
        get(port)
    descriptors, threads, resident = cost(process.pid)
    half = 5000 if thorough else 500

    def scrape(number: int) -> str:
        status, text = get(port, "/metrics" if number % 3 else "/metrics?collect[]=pressure")
        assert status == 200
        # The library takes longer to read a page than all the rest.
        assert number % 20 or sum(1 for _ in text_string_to_metric_families(text)) > 5
        return text

    with ThreadPoolExecutor(20) as clients:
        pages = list(clients.map(scrape, range(half)))
    assert len(pages) == half
    assert until(lambda: cost(process.pid)[:2] <= (descriptors, threads))
    # Its arenas grow with the threads that serve at once, and not with the scrapes.
    assert cost(process.pid)[2] < resident + 16 * 1024
    with ThreadPoolExecutor(20) as clients:
        list(clients.map(scrape, range(half)))
    assert until(lambda: cost(process.pid)[:2] <= (descriptors, threads))
    assert cost(process.pid)[2] < resident + 16 * 1024


@pytest.mark.real_time
def test_it_sleeps_while_nobody_asks(
    start: Start,
) -> None:
    process, port = start("--no-probes")
    get(port)

    def switches() -> int:
        found = 0
        for task in Path(f"/proc/{process.pid}/task").iterdir():
            for line in (task / "status").read_text().splitlines():
                if line.startswith("voluntary_ctxt_switches"):
                    found += int(line.split()[1])
        return found

    def calm() -> bool:
        """Whoever answered has gone back to its place; how soon is the scheduler's affair."""
        before = switches()
        time.sleep(0.5)
        return switches() == before

    assert until(calm)
    before = switches()
    time.sleep(3)
    assert switches() == before


def test_killed_and_started_again(
    start: Start,
) -> None:
    process, port = start()
    process.kill()
    process.wait()
    again, _ = start(port=port)
    assert get(port)[0] == 200
    again.send_signal(signal.SIGTERM)
    assert again.wait(GENEROUS_S) == 0


def test_systemd_passes_the_socket_and_hears_of_readiness(tmp_path: Path) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    told.bind(str(tmp_path / "notify"))
    told.settimeout(GENEROUS_S)
    # As systemd does it: descriptor 3, and the process id of the one that is started.
    script = "import os; os.environ['LISTEN_PID'] = str(os.getpid()); "
    script += "from infertune.exporter.main import main; raise SystemExit(main([]))"

    def third() -> None:
        os.dup2(listener.fileno(), 3, inheritable=True)

    process = subprocess.Popen(
        [sys.executable, "-B", "-c", script],
        env={**ENVIRONMENT, "LISTEN_FDS": "1", "NOTIFY_SOCKET": str(tmp_path / "notify")},
        stdin=subprocess.DEVNULL,
        close_fds=False,
        preexec_fn=third,
    )
    try:
        assert b"READY=1" in told.recv(4096)
        assert get(listener.getsockname()[1])[0] == 200
    finally:
        process.kill()
        process.wait()
        listener.close()
        told.close()


COUNT = """
import sys, time
from infertune.exporter import capabilities
from infertune.exporter.energy import Energy
from infertune.exporter.runner import collect
from infertune.base.root import Root
energy = Energy(Root(sys.argv[1]))
energy.open()
capabilities.drop_all()
for _ in range(2):
    result = collect(energy.collector(), Root("/"))
    print(result.state, result.why, *(sample.value for sample in result.samples))
    time.sleep(0.2)
"""


@pytest.mark.root_only
@pytest.mark.parametrize(("kind", "state"), [("1", "ok"), ("987654", "failed"), ("", "absent")])
def test_energy_is_read_without_a_capability(tmp_path: Path, kind: str, state: str) -> None:
    """No processor with such a counter here: the kernel's own clock (PERF_TYPE_SOFTWARE, 0)."""
    power = tmp_path / "sys/bus/event_source/devices/power"
    (power / "events").mkdir(parents=True)
    for name, text in (
        ("type", kind),
        ("cpumask", str(min(os.sched_getaffinity(0)))),
        ("events/energy-pkg", "event=0x00"),
        ("events/energy-pkg.scale", "1e-9"),
    ):
        (power / name).write_text(text + "\n")
    done = subprocess.run(
        [sys.executable, "-B", "-c", COUNT, str(tmp_path)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith(state)
    if state == "ok":  # nanoseconds of a CPU, as joules
        assert 0 < float(first.split()[1]) < float(second.split()[1]) - 0.1
    elif state == "failed":
        assert "perf_event_open" in first


def test_a_server_that_does_not_answer_is_a_state() -> None:
    from infertune.exporter.asking import ask
    from infertune.servers.engines import ENGINES
    from infertune.servers.engines.base import Known, Reading

    engine = ENGINES["llama-server"]
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        assert ask({"s": (port, engine.talk(Known()))}) == {"s": Reading("timeout")}
    assert ask({"s": (port, engine.talk(Known()))}) == {"s": Reading("unreachable")}


def test_prometheus_scrapes_it(start: Start, tmp_path: Path) -> None:
    prometheus = shutil.which("prometheus")
    if prometheus is None:
        pytest.skip("prometheus is not installed (Debian: prometheus)")
    _, port = start()
    own = free_port()
    config = tmp_path / "prometheus.yml"
    config.write_text(
        "global: {scrape_interval: 1s}\nscrape_configs:\n"
        "  - job_name: infertune\n    static_configs:\n"
        f"      - targets: ['127.0.0.1:{port}']\n"
    )
    process = subprocess.Popen(
        [
            prometheus,
            f"--config.file={config}",
            f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address=127.0.0.1:{own}",
            "--log.level=error",
        ],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def query(text: str) -> list[float]:
        status, body = get(own, "/api/v1/query?" + urllib.parse.urlencode({"query": text}))
        if status != 200:  # 503 while it starts
            raise ValueError(body)
        return [float(result["value"][1]) for result in json.loads(body)["data"]["result"]]

    try:
        assert until(lambda: query("up{job='infertune'}") == [1])
        assert until(  # probes and energy are collectors, too
            lambda: query("count(infertune_collector_success == 1)") == [len(COLLECTORS) + 2]
        )
        assert until(lambda: len(query("rate(process_cpu_seconds_total[10s])")) == 1)
        assert query("count(infertune_knob_files)")[0] > 5
    finally:
        process.terminate()
        process.wait(GENEROUS_S)
