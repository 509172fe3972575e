# SPDX-License-Identifier: Apache-2.0
"""A real llama-server as a router over two models: 200 scrapes load, wake and keep none.

Not a part of ``scripts/test``: it needs root and a directory that ``scripts/real-root`` makes.
Scrapes follow each other faster than a Prometheus would ask, and a model sleeps after ten seconds:
each scrape is one more chance to keep it.
"""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from infertune.base.root import Root
from infertune.exporter.collectors.engines import ENGINES_COLLECTOR
from infertune.exporter.runner import collect
from infertune.launch.ready import choose_port
from real.server import READY_S, running

pytestmark = [pytest.mark.root_only, pytest.mark.timeout(600)]

_SLEEP_S = 10


@contextmanager
def router(root: Path, log: Path) -> Iterator[int]:
    """A ready router over /m of the root; its port."""
    port = choose_port(None)
    flags = ["--models-dir", "/m", "--models-max", "2", "--sleep-idle-seconds", str(_SLEEP_S)]
    flags += ["--host", "127.0.0.1", "--port", str(port), "--metrics", "--device", "none"]
    flags += ["--ctx-size", "512", "--parallel", "1", "--threads", "1", "--no-warmup"]
    with running(root, flags, port, log, {"LLAMA_CACHE": "/cache", "HOME": "/cache"}):
        yield port


def ask(port: int, path: str, body: Mapping[str, object] | None = None) -> dict[str, Any]:
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=READY_S) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def test_two_hundred_scrapes_change_nothing(root: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with router(root, log) as port:
        declared = tmp_path / "etc/infertune/servers.d/r.toml"
        declared.parent.mkdir(parents=True)
        declared.write_text(
            f'profile = "quiet"\nunit = "r.service"\nport = {port}\nengine = "llama-server"\n'
        )
        machine = Root(tmp_path)
        machine.live = True

        def states() -> dict[str, str]:
            return {each["id"]: each["status"]["value"] for each in ask(port, "/models")["data"]}

        def scrape() -> tuple[dict[str, str], set[str]]:
            """State by model, and the models whose tokens are counted."""
            samples = collect(ENGINES_COLLECTOR, machine).samples
            told = {
                s.labels[1]: s.labels[2]
                for s in samples
                if s.metric == "infertune_model_state" and s.value
            }
            counted = {
                s.labels[1]
                for s in samples
                if s.metric == "infertune_model_tokens_predicted_total" and s.value
            }
            return told, counted

        build = str(ask(port, "/props")["build_info"])
        unloaded = states()
        assert len(unloaded) >= 2
        assert set(unloaded.values()) == {"unloaded"}
        for _ in range(60):
            assert scrape() == (unloaded, set())
        assert states() == unloaded

        two = sorted(unloaded)[:2]
        for name in two:
            ask(port, "/v1/completions", {"model": name, "prompt": "One, two", "max_tokens": 4})
        told, counted = scrape()
        assert {told[name] for name in two} == {"loaded"}
        assert counted == set(two)

        scrapes, end = 61, time.monotonic() + 120
        while {states()[name] for name in two} != {"sleeping"}:
            scrape()
            scrapes += 1
            assert time.monotonic() < end, "a model that is scraped does not fall asleep"
            time.sleep(0.1)
        for _ in range(max(50, 200 - scrapes)):
            told, counted = scrape()
            assert ({told[name] for name in two}, counted) == ({"sleeping"}, set())
        assert {states()[name] for name in two} == {"sleeping"}
    said = log.read_text(errors="replace")
    assert len(re.findall(r"spawning server instance with name", said)) == 2
    assert "exiting sleeping" not in said
    print(f"{build}: 200 scrapes or more, two loads (both asked for), none woken")
