# SPDX-License-Identifier: Apache-2.0
"""Inference engines: one file each, one entry here, and nothing else to touch."""

from infertune.servers.engines.base import Engine
from infertune.servers.engines.labelled import SGLANG, VLLM
from infertune.servers.engines.lemonade import LEMONADE
from infertune.servers.engines.llama_server import LLAMA_SERVER
from infertune.servers.engines.llama_swap import LLAMA_SWAP
from infertune.servers.engines.ollama import OLLAMA

ENGINES: dict[str, Engine] = {
    engine.id: engine for engine in (LLAMA_SERVER, LLAMA_SWAP, OLLAMA, LEMONADE, VLLM, SGLANG)
}
"""Every engine by the name that a declaration has for it."""


def engine_titled(title: str | None) -> Engine | None:
    """The engine that server_files/command_line.py calls so."""
    return next((engine for engine in ENGINES.values() if engine.title == title), None)
