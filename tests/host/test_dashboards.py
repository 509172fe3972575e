# SPDX-License-Identifier: Apache-2.0
"""Every query of every dashboard and rule has an answer in a real Prometheus.

Three machines are scraped.  ``here``: this kernel's real exporter with its probes, while the
embedded llama.cpp answers in the control group of a server.  ``recorded``: a Strix Halo that
serves, by the real exporter from a recorded tree; only its GPU scheduler's numbers are made, from
the probe's declaration, for no recorded tree can run BPF, and its energy with the tokens it was
used for.  ``waiting``: one with boot settings that
wait for a reboot, so that an alert fires.  A fourth does not answer.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dashboards_of import REPOSITORY, Query, operand, queries, rules
from drawing.draw import SPAN_S, draw
from infertune.base.records import replace
from infertune.base.root import Root
from infertune.boot import record
from infertune.host.cgroup import cgroup as read_cgroup
from infertune.host.machine import read_machine
from infertune.host.snapshot import open_snapshot
from infertune.launch.binary import embedded_is_installed, embedded_program
from infertune.launch.client import complete, healthy
from infertune.launch.embedded import default_model
from infertune.measure.statistics import HELPS, NO_EFFECT
from infertune.measure.store import OF_ROOT, machine_key
from infertune.measure.verdicts import QUIET, WHOLE, Measured, Thing, save

pytestmark = [pytest.mark.root_only, pytest.mark.timeout(300)]

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY / "daemon")}
SERVING = REPOSITORY / "tests" / "golden" / "strix-halo-128-serving.snapshot"
LAPTOP = REPOSITORY / "tests" / "fixtures" / "strix-halo-64-laptop.snapshot"
DECLARED = Path("/run/infertune/servers.d/gemma.toml")
READY_S = 120.0

ON_A_TREE = """
import sys, time
from infertune.exporter import web, webconfig
from infertune.exporter.base import Collector, Histogram, Sample
from infertune.exporter.collectors import engines
from infertune.exporter.energy import ENERGY_METRICS
from infertune.exporter.page import Page
from infertune.exporter.probes import metrics
from infertune.base.root import Root

OWN = {"pci_address": "0000:c2:00.0", "ring": "comp_1.0.0", "server": "gemma", "event": "done"}
METRICS = [each for each in metrics() if each.name.startswith("infertune_drm_scheduler_")]

def scheduler(root):
    '''The probe of the GPU scheduler, with numbers that grow.'''
    jobs = int(time.time()) % 100_000
    yield Sample("infertune_probe_state", ("drm_scheduler", "attached"), 1)
    for metric in METRICS:
        value = jobs if metric.kind == "counter" else 1
        if metric.kind == "histogram":
            value = Histogram((jobs, *[0] * len(metric.bounds)), jobs * 0.0004)
        yield Sample(metric.name, tuple(OWN[label] for label in metric.labels), value)

def energy(root):
    joules = time.time() % 1e6 * 50
    yield Sample("infertune_package_energy_joules_total", ("0",), joules)
    yield Sample("infertune_model_tokens_predicted_total", ("gemma", "m"), joules / 2)

made = (
    Collector(id="probes", summary="", metrics=metrics(), read=scheduler),
    Collector(id="energy", summary="", metrics=(*ENERGY_METRICS, *engines.METRICS), read=energy),
)
listener = web.listening_socket("127.0.0.1:0")
print(listener.getsockname()[1], flush=True)
page = Page(Root(sys.argv[1]), *(made if sys.argv[2] == "scheduler" else ()))
web.Server(listener, webconfig.WebConfig(), page, None).serve_forever(3600)
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def get(port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def until(true: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError, http.client.HTTPException):
            if true():
                return True
        time.sleep(0.3)
    return False


@dataclass(frozen=True)
class Prometheus:
    port: int

    def ask(self, path: str, **words: str) -> Any:
        """The data of an answer.  Raises ValueError with what Prometheus says is wrong."""
        status, body = get(self.port, f"/api/v1/{path}?{urllib.parse.urlencode(words)}")
        if status != 200:
            raise ValueError(body)
        return json.loads(body)["data"]

    def query(self, expr: str) -> list[dict[str, str]]:
        """Labels of each series of an answer; numbers that are none do not count as one."""
        result = self.ask("query", query=expr)["result"]
        return [each["metric"] for each in result if each["value"][1] != "NaN"]


def lacks(prometheus: Prometheus, query: Query) -> str | None:
    """What an answer has not."""
    try:
        found = prometheus.query(query.filled())
    except ValueError as error:
        return f"{query.where}: {error}"
    if not found:
        return f"{query.where}: no data: {query.expr}"
    for label in sorted(query.labels):
        if not any(label in series for series in found):
            return f"{query.where}: no label {label}: {query.expr}"
    return None


@pytest.fixture(autouse=True)
def no_leaks() -> None:
    """Not the rule of the other tests: the thread that asks outlives one."""


# -- the machines --------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes() -> Iterator[list[subprocess.Popen[Any]]]:
    started: list[subprocess.Popen[Any]] = []
    yield started
    for process in reversed(started):
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


def on_a_tree(base: Path, what: str, processes: list[subprocess.Popen[Any]]) -> int:
    """Start the exporter of a machine in a directory; its port."""
    command = [sys.executable, "-B", "-c", ON_A_TREE, str(base), what]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE)
    processes.append(process)
    assert process.stdout
    return int(process.stdout.readline())


@pytest.fixture(scope="module")
def recorded(
    tmp_path_factory: pytest.TempPathFactory, processes: list[subprocess.Popen[Any]]
) -> int:
    base = tmp_path_factory.mktemp("recorded") / "machine"
    with open_snapshot(str(SERVING)) as root:
        shutil.copytree(root.base, base, symlinks=True)
    proved(Root(base))
    return on_a_tree(base, "scheduler", processes)


def proved(root: Root) -> None:
    """What 'infertune prove' would have kept on that machine."""
    machine = read_machine(root)
    nobody = Thing(name="made up", path=None, stamp=None)
    one = Measured(
        profile="long-context", setting="vm.swappiness", value="10", arm=QUIET, word=NO_EFFECT,
        estimate=0.004, low=-0.01, high=0.02, pairs=16, day="2026-11-29",
        kernel=str(machine.kernel), backend="vulkan", model=nobody, server=nobody,
        keeps=None, bare=None,
    )  # fmt: skip
    busy = replace(one, setting=WHOLE, value=None, arm="cpu", word=HELPS, keeps=0.85, bare=0.31)
    save(root, OF_ROOT, machine_key(machine), [one, busy])


@pytest.fixture(scope="module")
def waiting(
    tmp_path_factory: pytest.TempPathFactory, processes: list[subprocess.Popen[Any]]
) -> int:
    base = tmp_path_factory.mktemp("waiting") / "machine"
    with open_snapshot(str(LAPTOP)) as root:
        shutil.copytree(root.base, base, symlinks=True)
    since = "2026-01-01T00:00:00+00:00"
    record.save(Root(base), record.Stage(phase="staged", profile="big", since=since, boot_id="1"))
    meminfo = base / "proc" / "meminfo"
    text = re.sub("(?m)^Cma.*\n", "", meminfo.read_text())
    meminfo.chmod(0o644)
    meminfo.write_text(f"{text}CmaTotal:  262144 kB\nCmaFree:  131072 kB\n")
    return on_a_tree(base, "", processes)


class Vllm(http.server.BaseHTTPRequestHandler):
    """What only vLLM and SGLang tell (vLLM 0.32, docs/usage/metrics.md)."""

    def do_GET(self) -> None:
        own, served = '{engine="0",model_name="qwen"}', time.time() % 1e6
        values = {
            "kv_cache_usage_perc": 0.25,
            "time_to_first_token_seconds_count": served,
            "time_to_first_token_seconds_sum": served * 0.25,
        }
        page = "".join(f"vllm:{name}{own} {each}\n" for name, each in values.items()).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def vllm() -> Iterator[None]:
    """A unit of this machine's owner that is declared to be vLLM."""
    declared = DECLARED.with_name("vllm.toml")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Vllm) as server:
        answering = threading.Thread(target=server.serve_forever)
        answering.start()
        try:
            declared.write_text(
                'profile = "quiet"\nunit = "vllm.service"\nengine = "vllm"\n'
                f"port = {server.server_port}\n"
            )
            yield
        finally:
            declared.unlink(missing_ok=True)
            server.shutdown()
            answering.join()


@pytest.fixture(scope="module")
def here(
    tmp_path_factory: pytest.TempPathFactory, processes: list[subprocess.Popen[Any]]
) -> Iterator[int]:
    """The exporter of this machine, with a server that answers all the time."""
    if not embedded_is_installed():
        pytest.skip("the extra 'embedded' is not installed")
    mount = read_cgroup(Root("/")).mount
    assert mount
    group = Path(mount, "infertune.slice", "infertune-server@gemma.service")
    assert not DECLARED.exists()
    assert not group.exists()
    port, own = free_port(), free_port()
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    program, env = embedded_program()
    words = [
        "--model",
        default_model(os.path.join(cache, "infertune")),
        "--alias",
        "gemma-3-270m",
        "--port",
        str(port),
    ]
    log = (tmp_path_factory.mktemp("here") / "log").open("wb")
    done, errors = threading.Event(), list[BaseException]()

    def load() -> None:
        try:
            while not done.is_set():
                complete(f"http://127.0.0.1:{port}", "One, two, three,", 16, timeout_s=READY_S)
        except Exception as error:
            errors.append(error)

    asking = threading.Thread(target=load)
    with contextlib.ExitStack() as undo:
        undo.callback(log.close)
        new = not DECLARED.parent.exists()
        DECLARED.parent.mkdir(parents=True, exist_ok=True)
        if new:
            undo.callback(DECLARED.parent.rmdir)
        DECLARED.write_text(f'profile = "quiet"\nport = {port}\n')
        undo.callback(DECLARED.unlink)
        undo.enter_context(vllm())
        above = not group.parent.exists()
        group.mkdir(parents=True)
        if above:
            undo.callback(group.parent.rmdir)
        undo.callback(group.rmdir)
        server = subprocess.Popen(
            [*program, *words, "--metrics", "--ctx-size", "512", "--threads", "1"],
            env={**os.environ, **env},
            stdout=log,
            stderr=log,
        )
        undo.callback(server.wait)
        undo.callback(server.kill)
        (group / "cgroup.procs").write_text(str(server.pid))
        assert until(lambda: healthy(f"http://127.0.0.1:{port}"), READY_S), Path(
            log.name
        ).read_text()
        asking.start()
        undo.callback(asking.join)
        undo.callback(done.set)
        command = [sys.executable, "-B", "-m", "infertune.exporter.main"]
        exporter = subprocess.Popen([*command, "--listen", f"127.0.0.1:{own}"], env=ENVIRONMENT)
        processes.append(exporter)
        assert until(lambda: get(own, "/-/healthy")[0] == 200, 60)
        yield own
        assert not errors, errors


@pytest.fixture(scope="module")
def prometheus(
    here: int,
    recorded: int,
    waiting: int,
    tmp_path_factory: pytest.TempPathFactory,
    processes: list[subprocess.Popen[Any]],
    request: pytest.FixtureRequest,
) -> Iterator[Prometheus]:
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed (Debian: prometheus)")
    base, port = tmp_path_factory.mktemp("prometheus"), free_port()
    shutil.copytree(REPOSITORY / "prometheus", base, dirs_exist_ok=True)
    targets = [here, recorded, waiting, free_port()]
    named = [{"targets": [f"127.0.0.1:{each}"], "labels": {}} for each in targets]
    (base / "targets" / "machines.json").write_text(json.dumps(named))
    config = base / "prometheus.yml"
    config.write_text(config.read_text().replace("15s", "1s"))
    command = [
        program,
        f"--config.file={config}",
        f"--storage.tsdb.path={base / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=error",
    ]
    processes.append(subprocess.Popen(command, cwd=base, stderr=subprocess.DEVNULL))
    found = Prometheus(port)
    assert until(lambda: get(port, "/-/ready")[0] == 200, 60)
    assert until(lambda: len(found.query("up{job='infertune'} == 1")) == 3, 60)
    began = time.monotonic()
    yield found
    if directory := request.config.getoption("--draw"):
        time.sleep(max(0, SPAN_S + 10 - (time.monotonic() - began)))
        called = ("here", "recorded", "waiting", "off")
        names = {f"127.0.0.1:{port}": name for port, name in zip(targets, called, strict=True)}
        draw(found.ask, names, Path(directory).resolve(), tmp_path_factory.mktemp("drawing"))


# -- what they answer ----------------------------------------------------------------


def test_every_query_has_an_answer(prometheus: Prometheus) -> None:
    left = list(queries())
    assert len(left) > 90
    end = time.monotonic() + 90
    missing: list[str] = []
    while left and time.monotonic() < end:
        asked = [(query, lacks(prometheus, query)) for query in left]
        left = [query for query, lack in asked if lack]
        missing = [lack for _, lack in asked if lack]
        time.sleep(2 if left else 0)
    assert not missing, "\n".join(missing)


def test_every_rule_has_an_answer(prometheus: Prometheus) -> None:
    def evaluated() -> bool:
        groups = prometheus.ask("rules")["groups"]
        found = [rule for group in groups for rule in group["rules"]]
        assert len(found) == len(list(rules()))
        return all(rule["health"] == "ok" for rule in found)

    assert until(evaluated, 60)
    left = [
        Query(rule["record"], rule["record"])
        if "record" in rule
        else Query(rule["alert"], operand(rule["expr"]))
        for rule in rules()
    ]

    def missing() -> list[str]:
        return [lack for query in left if (lack := lacks(prometheus, query))]

    until(lambda: not missing(), 60)
    assert not missing()


def test_an_alert_fires(prometheus: Prometheus, waiting: int) -> None:
    def firing() -> set[tuple[str, str]]:
        return {
            (each["labels"]["alertname"], each["labels"]["instance"])
            for each in prometheus.ask("alerts")["alerts"]
            if each["state"] == "firing"
        }

    expected = {("InfertuneRebootPendingTooLong", f"127.0.0.1:{waiting}")}
    assert until(lambda: firing() == expected, 30), firing()


def test_the_server_under_load_is_seen(prometheus: Prometheus, here: int) -> None:
    """Its tokens and its threads are of the same server, by name."""
    machine = f'instance="127.0.0.1:{here}"'
    busy = f'rate(infertune_thread_seconds_total{{{machine},server="gemma",state="running"}}[10s])'
    assert until(lambda: bool(prometheus.query(f"{busy} > 0.2")), 60)
    tokens = f'rate(infertune_model_tokens_predicted_total{{{machine},server="gemma"}}[10s])'
    assert until(lambda: bool(prometheus.query(f"{tokens} > 1")), 60)
