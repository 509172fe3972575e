# SPDX-License-Identifier: Apache-2.0
"""The step before a start of an adopted unit, on this kernel, as the unit's user has it."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import gguf_files
from known_models import KNOWN

pytestmark = pytest.mark.root_only

DAEMON = Path(__file__).resolve().parents[2] / "daemon"
NOBODY = 65534
STEP = f"""
import os, sys
sys.path.insert(0, {str(DAEMON)!r})
sys.argv[0] = "admit"
sys.dont_write_bytecode = True
from infertune.admit import main
sys.exit(main())
"""


def step(
    line: str, unit: str, *, walls: str = ":", **variables: str
) -> subprocess.CompletedProcess[str]:
    """What the step says and ends with where /run and /etc declare this; nothing of it stays."""
    text = f'unit = "llm.service"\nprofile = "x"\nbackend = "cpu"\n{line}\n'
    script = f"""
        set -e
        mount -t tmpfs none /run
        mkdir -p /run/infertune/servers.d /run/systemd/system
        printf %s {shlex.quote(text)} > /run/infertune/servers.d/llm.toml
        printf %s {shlex.quote(unit)} > /run/systemd/system/llm.service
        {walls}
        exec setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups --no-new-privs \
            {shlex.quote(sys.executable)} -I -c {shlex.quote(STEP)} llm
    """
    return subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", script],
        env={"PATH": os.environ["PATH"], **variables},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module", autouse=True)
def _readable() -> None:
    tried = ["setpriv", "--reuid", str(NOBODY), "--clear-groups"]
    code = [sys.executable, "-I", "-c", f"import os; os.listdir({str(DAEMON)!r})"]
    if subprocess.run([*tried, *code], capture_output=True, check=False).returncode:
        pytest.skip("other users cannot read this checkout")


SLEEPS = "[Service]\nExecStart=/usr/bin/sleep 9\n"
HUGE = 'memory = "900TiB"'


def test_what_is_declared_is_judged() -> None:
    done = step(f'admission = "refuse"\n{HUGE}', SLEEPS)
    assert done.returncode == 2
    assert done.stderr.startswith("<3>infertune: does not fit: RAM: 900 TiB of "), done.stderr
    done = step('admission = "refuse"\nmemory = "1MiB"', SLEEPS)
    assert (done.returncode, done.stderr) == (0, "")
    done = step(f'admission = "warn"\n{HUGE}', SLEEPS)
    assert done.returncode == 0
    assert done.stderr.startswith('<4>infertune: admission = "warn" overrides: does not fit: RAM:')


def test_a_model_is_judged_with_the_variables_of_the_unit(tmp_path: Path) -> None:
    model = next(each for each in KNOWN if each.name == "Llama 3.1 8B")
    path = gguf_files.write(tmp_path / "m.gguf", model.metadata(), model.tensors())
    unit = "[Service]\nExecStart=/usr/bin/llama-server -m /run/m.gguf -c $CTX -np 1 -ngl 0\n"
    for mode, code, says in (
        ("644", 2, "does not fit: RAM: "),
        ("600", 0, "whether the model fits is unknown: "),  # its user may not read it
    ):
        walls = f"cp {shlex.quote(str(path))} /run/m.gguf && chmod {mode} /run/m.gguf"
        done = step('admission = "refuse"', unit, walls=walls, CTX=str(2**24))
        assert done.returncode == code, done.stderr
        assert says in done.stderr


@pytest.mark.parametrize(
    "walls",
    [
        "mount -t tmpfs none /sys",
        "mount --bind /dev/null /proc/meminfo",
        "rm /run/infertune/servers.d/llm.toml",
        "chmod 700 /run/infertune",
        "echo nonsense > /run/infertune/servers.d/llm.toml",
        "ulimit -f 0",
    ],
)
def test_whatever_it_may_not_see_it_keeps_nothing_down(walls: str) -> None:
    done = step(f'admission = "warn"\n{HUGE}', SLEEPS, walls=walls)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_without_proc_nothing_is_refused() -> None:
    walls = "mount --bind /dev/null /proc/meminfo && mount -t tmpfs none /sys"
    done = step(f'admission = "refuse"\n{HUGE}', SLEEPS, walls=walls)
    assert done.returncode == 0, done.stderr
