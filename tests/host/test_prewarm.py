# SPDX-License-Identifier: Apache-2.0
"""A cold file on a disk of this machine, read ahead by this kernel."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from infertune.cli.main import main
from infertune.launch.residency import resident

MIB = 2**20
SIZE = 64 * MIB


@pytest.fixture
def model() -> Iterator[str]:
    """Of two parts, none of which is in memory."""
    paths = [Path(f"/var/tmp/infertune-{os.getpid()}-{each:05}-of-00002.gguf") for each in (1, 2)]
    try:
        for path in paths:
            with path.open("wb") as file:
                file.write(b"GGUF" + os.urandom(SIZE // 2 - 4))
                file.flush()
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if resident(list(map(str, paths))) != 0:
            pytest.skip("/var/tmp is in memory, or the kernel does not tell what is")
        yield str(paths[0])
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


def test_a_cold_model_is_in_memory_afterwards(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["prewarm", model, "--json"]
    assert main([*asked, "--max", str(SIZE // 4)]) == 0
    [first] = json.loads(capsys.readouterr().out)["models"]
    # To see whether it is a model its head was read.
    assert first["before"] < MIB
    assert first["read"] == SIZE // 4
    assert SIZE // 8 < first["after"] < SIZE
    assert main(asked) == 0
    [second] = json.loads(capsys.readouterr().out)["models"]
    assert second["outcome"] == "read"
    assert second["after"] >= 0.98 * SIZE
    assert main(asked) == 0
    [third] = json.loads(capsys.readouterr().out)["models"]
    assert (third["outcome"], third["read"]) == ("resident", 0)
