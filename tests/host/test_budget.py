# SPDX-License-Identifier: Apache-2.0
"""A real server under a real model: what it takes is what was predicted, within 10 %."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from infertune.base.root import Root
from infertune.base.units import MIB
from infertune.budget.bandwidth import read_bandwidth
from infertune.budget.gguf_file import read_model
from infertune.budget.parts import parts
from infertune.budget.settings import server_memory
from infertune.budget.shape import read_shape
from infertune.host.machine import read_machine
from infertune.launch.binary import embedded_is_installed, embedded_program
from infertune.launch.client import complete, healthy
from infertune.launch.embedded import default_model
from infertune.launch.ready import choose_port

pytestmark = pytest.mark.skipif(
    not embedded_is_installed(), reason="the extra 'embedded' is not installed"
)

_READY_S = 120.0
PROMPT = "The quick brown fox jumps over the lazy dog. " * 90
"""Longer than one ubatch of 512 tokens: the working memory is used."""

CASES = {
    "4096, f16": ("4096", "f16", "f16"),
    "16384, q8_0": ("16384", "q8_0", "q8_0"),
    "32768, f16": ("32768", "f16", "f16"),
    "32768, q8_0 and q4_0": ("32768", "q8_0", "q4_0"),
}


@pytest.fixture(scope="module")
def model() -> str:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return default_model(os.path.join(cache, "infertune"))


@pytest.fixture
def servers() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def resident(pid: int) -> int:
    """Bytes in memory, with the pages of files: of the model's all, whoever maps them too, and of
    others' libraries its part."""
    kilobytes, of_the_model = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, _, value = line.partition(":")
        if "-" in name.split(" ")[0]:
            of_the_model = line.endswith(".gguf")
        elif name == ("Rss" if of_the_model else "Pss"):
            kilobytes += int(value.split()[0])
    return kilobytes * 1024


def serve(
    flags: dict[str, str], model: str, servers: list[subprocess.Popen[bytes]], log_file: Path
) -> str:
    """Start a server, wait until it is ready; its address."""
    port = choose_port(None)
    words = {**flags, "--model": model, "--port": str(port), "--parallel": "1", "--cache-ram": "0"}
    program, env = embedded_program()
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [*program, *(word for pair in words.items() for word in pair)],
            env={**os.environ, **env},
            stdout=log,
            stderr=log,
        )
    servers.append(process)
    url = f"http://127.0.0.1:{port}"
    end = time.monotonic() + _READY_S
    while not healthy(url):
        assert process.poll() is None, log_file.read_text()
        assert time.monotonic() < end, "not ready"
        time.sleep(0.2)
    return url


def test_llama_cpp_reads_the_same(
    model: str, servers: list[subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    """What the server says of the model it has loaded, by another reader than ours."""
    url = serve({"--ctx-size": "256"}, model, servers, tmp_path / "log")
    with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as answer:
        theirs = json.load(answer)["data"][0]["meta"]
    ours = read_shape(read_model(model))
    assert (ours.parameters, ours.weights_bytes) == (theirs["n_params"], theirs["size"])
    assert (ours.vocab, ours.embedding) == (theirs["n_vocab"], theirs["n_embd"])
    assert ours.context == theirs["n_ctx_train"]


@pytest.mark.parametrize("case", CASES)
def test_predicted_is_measured(
    case: str, model: str, servers: list[subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    ctx, k, v = CASES[case]
    given = {"ctx_size": ctx, "parallel": "1", "cache_type_k": k, "cache_type_v": v}
    flags = {"--ctx-size": ctx, "--cache-type-k": k, "--cache-type-v": v, "--flash-attn": "on"}
    url = serve(flags, model, servers, tmp_path / "log")
    complete(url, PROMPT, 4, timeout_s=_READY_S)
    measured = resident(servers[-1].pid)
    shape = read_shape(read_model(model))
    found = parts(shape, server_memory({**given, "cache_ram": "0"}), "cpu")
    predicted = sum(part.bytes for part in found if part.when != "later")
    print(f"{case}: predicted {predicted / MIB:.0f} MiB, measured {measured / MIB:.0f} MiB")
    assert predicted == pytest.approx(measured, rel=0.10)


def test_memory_is_read_faster_than_a_disk_and_slower_than_a_cache() -> None:
    speed = read_bandwidth(read_machine(Root()))
    if speed is None:
        pytest.skip("less than 512 MiB available")
    assert 1e8 < speed < 2e12
    print(f"{speed / 1e9:.1f} GB/s", file=sys.stderr)
