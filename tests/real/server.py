# SPDX-License-Identifier: Apache-2.0
"""A real llama-server that runs in a root of its own."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from infertune.launch.client import healthy

READY_S = 300.0
_END_S = 20.0


@contextmanager
def running(
    root: Path, words: Sequence[str], port: int, log: Path, environment: Mapping[str, str]
) -> Iterator[str]:
    """A ready server in the root, with mounts of its own that end with it; its address."""
    # Without /proc it does not know the machine's CPUs.
    mounts = " && ".join(f"mount --bind /{name} '{root}/{name}'" for name in ("proc", "sys", "dev"))
    start = f"{mounts} && exec chroot '{root}' llama-server \"$@\""
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", start, "sh", *words],
            env={**os.environ, **environment},
            stdout=output,
            stderr=output,
        )
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + READY_S
        while not healthy(url):
            assert process.poll() is None, log.read_text(errors="replace")[-2000:]
            assert time.monotonic() < end, "not ready"
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()  # a router ends its models' servers
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
