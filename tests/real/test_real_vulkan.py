# SPDX-License-Identifier: Apache-2.0
"""Every buffer that a real llama-server allocates with a GPU backend, against the sums of ``fit``.

Not a part of ``scripts/test``: it needs root and a directory that ``scripts/real-root`` makes.
The device is a software one, so nothing here says how fast or how much a driver takes for itself.
"""

from __future__ import annotations

import json
import re
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from infertune.base.records import replace
from infertune.base.units import MIB
from infertune.budget.companions import read_companions
from infertune.budget.gguf_file import read_model
from infertune.budget.kv import checkpoint_bytes
from infertune.budget.parts import parts
from infertune.budget.settings import server_memory
from infertune.budget.shape import read_shape
from infertune.launch.ready import choose_port
from real.server import READY_S, running

pytestmark = [pytest.mark.root_only, pytest.mark.timeout(600)]

_LONGEST_STORAGE_BUFFER = 128 * MIB
"""llvmpipe's maxStorageBufferRange (vulkaninfo): a longer tensor stays with the CPU."""

FLAGS = {
    "ctx_size": "--ctx-size",
    "parallel": "--parallel",
    "ubatch_size": "--ubatch-size",
    "cache_type_k": "--cache-type-k",
    "cache_type_v": "--cache-type-v",
    "flash_attn": "--flash-attn",
    "model_draft": "--model-draft",
    "spec_type": "--spec-type",
}


@dataclass(frozen=True)
class Case:
    model: str
    settings: Mapping[str, str] = field(default_factory=dict)


GEMMA, SMOL = "gemma3-270m", "smollm2-135m"
CASES = {
    "defaults": Case(SMOL, {"ctx_size": "8192"}),
    "one slot": Case(SMOL, {"ctx_size": "4096", "parallel": "1"}),
    "q8_0": Case(
        SMOL,
        {"ctx_size": "16384", "parallel": "1", "cache_type_k": "q8_0", "cache_type_v": "q8_0"},
    ),
    "q4_0, small ubatch": Case(
        SMOL,
        {
            "ctx_size": "32768",
            "parallel": "1",
            "ubatch_size": "128",
            "cache_type_k": "q4_0",
            "cache_type_v": "q4_0",
        },
    ),
    "large ubatch": Case(SMOL, {"ctx_size": "8192", "parallel": "1", "ubatch_size": "2048"}),
    "no fa, two": Case(SMOL, {"ctx_size": "8192", "parallel": "2", "flash_attn": "off"}),
    "windows, one slot": Case(GEMMA, {"ctx_size": "4096", "parallel": "1"}),
    "windows, four unified": Case(GEMMA, {"ctx_size": "32768"}),
    "windows, two split": Case(GEMMA, {"ctx_size": "16384", "parallel": "2"}),
    "windows, q8_0": Case(
        GEMMA,
        {"ctx_size": "16384", "parallel": "1", "cache_type_k": "q8_0", "cache_type_v": "q8_0"},
    ),
    "windows, no fa": Case(
        GEMMA,
        {"ctx_size": "16384", "parallel": "2", "flash_attn": "off", "ubatch_size": "256"},
    ),
    "windows kept whole": Case(GEMMA, {"ctx_size": "8192", "parallel": "2", "swa_full": "1"}),
    "a draft": Case(
        SMOL,
        {
            "ctx_size": "8192",
            "parallel": "2",
            "cache_type_k": "q8_0",
            "cache_type_v": "q8_0",
            "ubatch_size": "256",
            "spec_type": "draft-simple",
            "model_draft": SMOL,
        },
    ),
}


def arguments(settings: Mapping[str, str]) -> Iterator[str]:
    for name, value in settings.items():
        if name == "swa_full":
            yield "--swa-full"
        else:
            yield from (FLAGS[name], f"/m/{value}.gguf" if name == "model_draft" else value)


@contextmanager
def server(root: Path, model: str, log: Path, *words: str) -> Iterator[str]:
    """A ready server with a model of the root; its address."""
    port = choose_port(None)
    flags = ["--model", f"/m/{model}.gguf", "--host", "127.0.0.1", "--port", str(port)]
    flags += ["--fit", "off", "--no-warmup", "--threads", "2", "--log-verbosity", "4", *words]
    # Without the first a Vulkan device that is a CPU is passed over.
    environment = {"GGML_VK_VISIBLE_DEVICES": "0", "MESA_SHADER_CACHE_DIR": "/cache"}
    with running(root, flags, port, log, environment) as url:
        yield url


_KINDS = {"model": "weights", "KV": "KV", "compute": "compute", "output": "output"}


def printed(log: str) -> Counter[str]:
    """Bytes by kind and place, as the server printed them."""
    found: Counter[str] = Counter()
    lines = re.findall(r" (\S+) +(model|KV|compute|output) buffer size = +([\d.]+) MiB", log)
    for buffer, kind, size in lines:
        where = "GPU" if buffer.startswith("Vulkan") and buffer != "Vulkan_Host" else "host"
        found[f"{_KINDS[kind]} {where}"] += float(size) * MIB
    return found


def predicted(case: Case, root: Path) -> Counter[str]:
    path = root / "m" / f"{case.model}.gguf"
    files = {
        name: str(root / "m" / f"{value}.gguf")
        for name, value in case.settings.items()
        if name == "model_draft"
    }
    memory = replace(server_memory({**case.settings, **files}), companions=read_companions(files))
    shape = read_shape(read_model(str(path)))
    found: Counter[str] = Counter()
    for part in parts(shape, memory, "vulkan"):
        kind = re.search(r"weights|KV|compute|inputs|output", part.what)
        if kind and part.when == "start":
            word = "compute" if kind[0] == "inputs" else kind[0]
            found[f"{word} {part.where}"] += part.bytes
    if shape.input_bytes > _LONGEST_STORAGE_BUFFER:
        found["weights GPU"] -= shape.input_bytes
    return found


@pytest.mark.parametrize("name", CASES)
def test_every_buffer_is_what_was_predicted(name: str, root: Path, tmp_path: Path) -> None:
    case, log = CASES[name], tmp_path / "log"
    words = ("--n-gpu-layers", "99", *arguments(case.settings))
    with server(root, case.model, log, *words):
        pass
    theirs, ours = printed(log.read_text(errors="replace")), predicted(case, root)
    assert theirs.keys() == ours.keys()
    wrong = []
    for kind in sorted(theirs):
        print(f"{name}: {kind}: measured {theirs[kind] / MIB:.2f}, ours {ours[kind] / MIB:.2f} MiB")
        if ours[kind] != pytest.approx(theirs[kind], rel=0.02, abs=MIB):
            wrong.append(kind)
    assert not wrong


SLOTS = {
    "one": {"ctx_size": "8192", "parallel": "1"},
    "four unified": {"ctx_size": "16384"},
    "two split": {"ctx_size": "16384", "parallel": "2"},
}


@pytest.mark.parametrize("name", SLOTS)
def test_checkpoints_are_as_large_as_predicted(name: str, root: Path, tmp_path: Path) -> None:
    """On the CPU, where a long prompt takes seconds: a checkpoint is the same whatever computes."""
    settings, log = SLOTS[name], tmp_path / "log"
    shape = read_shape(read_model(str(root / "m" / f"{GEMMA}.gguf")))
    memory = server_memory(settings)
    words = ("--device", "none", *arguments(settings))
    with server(root, GEMMA, log, *words) as url:
        prompt = "one two three four five six seven eight nine ten " * 130
        body = {"prompt": prompt, "n_predict": 1, "id_slot": 0}
        request = urllib.request.Request(
            f"{url}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=READY_S) as answer:
            tokens = json.load(answer)["timings"]["prompt_n"]
    text = log.read_text(errors="replace")
    sizes = [
        float(size) * MIB
        for size in re.findall(r"created context checkpoint.*size = (\S+) M", text)
    ]
    assert tokens > 1024, "fewer than window and ubatch"
    assert sizes, "no checkpoint was made"
    print(f"{name}: {tokens} tokens, {[round(size / MIB, 3) for size in sizes]} MiB")
    assert max(sizes) == pytest.approx(checkpoint_bytes(shape, memory, masked=True), rel=0.01)
    assert max(sizes) <= checkpoint_bytes(shape, memory, masked=False)
