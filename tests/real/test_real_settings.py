# SPDX-License-Identifier: Apache-2.0
"""A real llama-server reads every setting with every value, and starts with groups of them.

Not a part of ``scripts/test``: it needs root and a directory that ``scripts/real-root`` makes.
``--version`` behind other flags ends the program once it has read those: so each value is asked of
the program's own parser, without a model.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from infertune.catalogue.server_settings import parse_server_setting, server_arguments
from infertune.launch.client import healthy
from infertune.launch.ready import choose_port
from real.server import running
from unit.test_server_help import EVERY

pytestmark = [pytest.mark.root_only, pytest.mark.timeout(600)]

_MODEL = "/m/smollm2-135m.gguf"


def said(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = ["chroot", str(root), "llama-server", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def arguments(root: Path, settings: Mapping[str, str | int | bool], port: int = 1) -> list[str]:
    """The command line for these settings; nothing may be left out."""
    canonical = {name: parse_server_setting(name, value) for name, value in settings.items()}
    help_text = said(root, "--help").stdout
    found, refused = server_arguments(canonical, help_text, model=_MODEL, port=port)
    assert refused == []
    return found


def test_the_program_reads_every_value(root: Path) -> None:
    wrong = {}
    for name, value in EVERY:
        # A path is opened when it is read; the model is one that is there.
        value = _MODEL if value == "/m/x.gguf" else value
        done = said(root, *arguments(root, {name: value}), "--version")
        if done.returncode:
            wrong[name, value] = done.stderr[:200]
    assert wrong == {}
    assert said(root, "--prio", "9", "--version").returncode, "it reads what stands before"
    version = said(root, "--version").stderr.splitlines()[0]
    print(f"{len(EVERY)} values read by {version}")


GROUPS: Mapping[str, Mapping[str, str | int | bool]] = {
    "sizes": {"ctx_size": 2048, "batch_size": 256, "ubatch_size": 64, "parallel": 2,
              "threads": 1, "threads_batch": 1, "cache_ram": "64MiB", "cache_reuse": 16},
    "switches on": {"kv_unified": True, "kv_offload": True, "cont_batching": True, "warmup": True,
                    "metrics": True, "slots": True, "jinja": True, "swa_full": True},
    "switches off": {"kv_unified": False, "kv_offload": False, "cont_batching": False,
                     "warmup": False, "slots": False, "jinja": False, "fit": "off"},
    "small cache": {"flash_attn": "on", "cache_type_k": "q8_0", "cache_type_v": "q8_0"},
    "no mapping": {"load_mode": "none", "prio": 0, "poll": 0, "gpu_layers": "all"},
    "no cache of files": {"load_mode": "dio", "n_cpu_moe": 1, "gpu_layers": 0},
    "a drafting model": {"spec_type": "draft-simple", "model_draft": _MODEL,
                         "spec_draft_n_max": 4},
    "guesses": {"spec_type": "ngram-simple,ngram-mod", "ctx_checkpoints": 2,
                "checkpoint_min_step": 64},
    "a name": {"alias": "small one", "sleep_idle_seconds": 600, "mmproj_offload": False},
}  # fmt: skip


@pytest.mark.parametrize("group", GROUPS)
def test_it_starts(root: Path, group: str, tmp_path: Path) -> None:
    port = choose_port(None)
    own = {"ctx_size": 1024, "threads": 1, "parallel": 1, "warmup": False, **GROUPS[group]}
    words = [*arguments(root, own, port), "--device", "none"]
    with running(root, words, port, tmp_path / "log", {"HOME": "/cache"}) as url:
        assert healthy(url)
