# SPDX-License-Identifier: Apache-2.0
"""What a series costs a real Prometheus: memory of its head, bytes on disk, time of a scrape.

    .venv/bin/python benchmarks/prometheus_scale.py

Serves recorded machines under many names from one process (their counters grow), lets a real
Prometheus scrape them every second, and reads its own figures: two sizes in one run, so that the
difference is the cost of the added series and not of Prometheus itself.
"""

from __future__ import annotations

import http.server
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from datetime import UTC, datetime
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = (REPOSITORY / "tests/golden/strix-halo-128-serving.metrics").read_text()
SIZES = (20, 120)
SECONDS = 90
TODAY = datetime.now(UTC).date().isoformat()


def text() -> bytes:
    """The page, with counters that grow as time does."""
    now = int(time.time())
    lines = []
    for line in PAGE.splitlines():
        name, _, value = line.rpartition(" ")
        if "_total" in name and not line.startswith("#"):
            value = str(float(value) + now)
        lines.append(f"{name} {value}")
    return ("\n".join(lines) + "\n").encode()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = text()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def measure(hosts: int) -> dict[str, float]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as scratch:
        port = server.server_address[1]
        own = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        listen = own.server_address[1]
        own.server_close()
        targets = [f"127.0.0.1:{port}"]
        jobs = "".join(
            f"  - job_name: host{n}\n    metrics_path: /{n}\n"
            f"    static_configs: [{{targets: {json.dumps(targets)}, labels: {{host: '{n}'}}}}]\n"
            for n in range(hosts)
        )
        config = Path(scratch, "prometheus.yml")
        config.write_text(f"global: {{scrape_interval: 1s}}\nscrape_configs:\n{jobs}")
        program = shutil.which("prometheus") or sys.exit("prometheus is not installed")
        process = subprocess.Popen(
            [
                program,
                f"--config.file={config}",
                f"--storage.tsdb.path={scratch}/data",
                f"--web.listen-address=127.0.0.1:{listen}",
                "--log.level=error",
            ]
        )
        try:
            time.sleep(SECONDS)
            url = f"http://127.0.0.1:{listen}"
            with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
                page = answer.read().decode()
            status = Path(f"/proc/{process.pid}/status").read_text()
            resident = re.search(r"VmRSS:\s+(\d+)", status)
            query = urllib.parse.urlencode({"query": "avg(scrape_duration_seconds)"})
            with urllib.request.urlopen(f"{url}/api/v1/query?{query}", timeout=30) as answer:
                scrape = json.load(answer)["data"]["result"][0]["value"][1]
            assert resident
            wal = sum(path.stat().st_size for path in Path(scratch, "data", "wal").iterdir())
            return {
                "hosts": hosts,
                "series": value(page, "prometheus_tsdb_head_series"),
                "samples": value(page, "prometheus_tsdb_head_samples_appended_total"),
                "resident": int(resident[1]) * 1024,
                "cpu": value(page, "process_cpu_seconds_total"),
                "wal": wal,
                "scrape": float(scrape),
            }
        finally:
            process.terminate()
            process.wait()
            server.shutdown()
            server.server_close()


def value(page: str, name: str) -> float:
    lines = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", page, re.MULTILINE)
    return sum(map(float, lines))


def main() -> None:
    small, large = (measure(hosts) for hosts in SIZES)
    series = large["series"] - small["series"]
    samples = large["samples"] - small["samples"]
    rows = [
        ("series of one machine", f"{series / (SIZES[1] - SIZES[0]):.0f}"),
        ("resident memory a series", f"{(large['resident'] - small['resident']) / series:.0f} B"),
        ("CPU a sample", f"{(large['cpu'] - small['cpu']) / samples * 1e6:.2f} µs"),
        ("write-ahead log a sample", f"{(large['wal'] - small['wal']) / samples:.1f} B"),
        ("scrape of one machine (page of this process)", f"{large['scrape'] * 1e3:.1f} ms"),
    ]
    out = [
        f"# What a series costs Prometheus, {TODAY}",
        "",
        f"`benchmarks/prometheus_scale.py`: {SIZES[0]} and {SIZES[1]} machines, each second",
        f"for {SECONDS} s each, in one run; the difference of the two. Two shared cores.",
        "",
        "| what | measured |",
        "|---|---|",
        *(f"| {name} | {figure} |" for name, figure in rows),
        "",
    ]
    target = REPOSITORY / "benchmarks/results" / f"prometheus-scale-{TODAY}.md"
    target.write_text("\n".join(out))
    print("\n".join(out))


if __name__ == "__main__":
    main()
