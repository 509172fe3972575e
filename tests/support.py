# SPDX-License-Identifier: Apache-2.0
"""A small machine with a kernel that behaves, for tests of the engine.

The real kernel's habits that matter to a transaction are all here: values that
move along with others, a preference that is locked by a governor, a number that
is clamped, a choice that is refused.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path

from infertune.base.root import Root, Step
from infertune.catalogue.knobs import KNOBS
from infertune.engine.session import session
from infertune.profiles.profile import Source
from infertune.profiles.resolve import Desired, Setting

GENEROUS_S = 400
"""What takes a second on an idle machine has ended by then, or hangs."""

THP = "/sys/kernel/mm/transparent_hugepage"
CPUFREQ = "/sys/devices/system/cpu/cpufreq"

FILES = {
    "/proc/sys/kernel/random/boot_id": "11111111-2222-3333-4444-555555555555\n",
    "/proc/sys/kernel/osrelease": "7.1.3\n",
    "/proc/meminfo": "MemTotal:       131072000 kB\n",
    f"{THP}/enabled": "always [madvise] never\n",
    f"{THP}/defrag": "always defer defer+madvise [madvise] never\n",
    f"{THP}/khugepaged/pages_to_scan": "4096\n",
    "/proc/sys/vm/swappiness": "60\n",
    "/proc/sys/vm/min_free_kbytes": "67584\n",
    "/proc/sys/vm/watermark_scale_factor": "10\n",
    "/proc/sys/kernel/numa_balancing": "0\n",
    **{
        f"{CPUFREQ}/policy{number}/{name}": text
        for number in (0, 1)
        for name, text in {
            "scaling_governor": "powersave\n",
            "scaling_available_governors": "performance powersave\n",
            "energy_performance_preference": "balance_performance\n",
            "energy_performance_available_preferences": "default performance "
            "balance_performance balance_power power\n",
        }.items()
    },
    "/sys/firmware/acpi/platform_profile": "balanced\n",
    "/sys/firmware/acpi/platform_profile_choices": "low-power balanced performance\n",
}

Values = Mapping[str, str | int | bool]

LONG: Values = {
    "transparent_hugepage.enabled": "always",
    "vm.swappiness": 10,
    "cpufreq.scaling_governor": "performance",
    "platform_profile": "performance",
}
"""A profile with a side effect, per-CPU files, a risky knob, and a plain one."""

QUIET: Values = {
    "transparent_hugepage.enabled": "always",
    "vm.swappiness": 1,
    "cpufreq.energy_performance_preference": "power",
    "transparent_hugepage.khugepaged.pages_to_scan": 8192,
}
"""Shares one value with LONG, changes one, drops two and adds two."""


class FakeKernel(Root):
    """A recorded machine whose files influence each other as the kernel's do."""

    def write_value(self, path: str, text: str) -> None:
        name = path.rpartition("/")[2]
        policy = self.at(path).parent
        if name == "energy_performance_preference":
            governor = (policy / "scaling_governor").read_text().strip()
            if governor == "performance" and text != "performance":
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)
        if name == "pages_to_scan":
            text = str(min(int(text), 5000))
        super().write_value(path, text)
        if name == "scaling_governor":
            hint = "performance" if text == "performance" else "balance_performance"
            (policy / "energy_performance_preference").write_text(hint + "\n")
        if path == f"{THP}/enabled":
            reserve = {"always": "90112", "madvise": "67584", "never": "11584"}[text]
            self.at("/proc/sys/vm/min_free_kbytes").write_text(reserve + "\n")


def build(base: Path) -> FakeKernel:
    """A fresh machine in the directory ``base``."""
    for path, text in FILES.items():
        file = base / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (base / "run").mkdir(exist_ok=True)
    (base / "var/lib").mkdir(parents=True, exist_ok=True)
    return FakeKernel(base)


def reset(base: Path) -> None:
    """The files of a fresh machine again, in place."""
    for path, text in FILES.items():
        (base / path.lstrip("/")).write_text(text)
    for directory in ("run/infertune", "var/lib/infertune"):
        shutil.rmtree(base / directory, ignore_errors=True)


def values(base: Path) -> dict[str, str]:
    """What every kernel file of the machine says."""
    return {path: (base / path.lstrip("/")).read_text() for path in FILES}


def with_hook(base: Path, hook: Callable[[Step], int | None]) -> FakeKernel:
    return FakeKernel(base, hook=hook)


def desired(name: str, wanted: Values, *, required: bool = False) -> Desired:
    """What a profile with these values comes to."""
    settings = [
        Setting(
            id=knob,
            configured=value,
            canonical=KNOBS[knob].value.parse(value),
            required=required,
            because=None,
            source=Source(f"{name}.toml", number, name),
            overridden=(),
        )
        for number, (knob, value) in enumerate(wanted.items(), start=1)
    ]
    return Desired(
        profile=name,
        backend="cpu",
        now=tuple(settings),
        boot=(),
        launch={},
        env={},
        server={},
        unresolved=(),
    )


def apply(root: Root, name: str, wanted: Values) -> None:
    with session(root, f"apply {name}") as ours:
        ours.apply(desired(name, wanted))


def revert(root: Root) -> None:
    with session(root, "revert") as ours:
        ours.revert()


def recover(root: Root) -> None:
    with session(root, "recover") as ours:
        if ours.recovered is None:
            ours.revert()


class Clock:
    """The engine's clock: every look is a second later (or ``step_s``), however busy the machine.

    A journal says when it was applied, and two that differ in nothing else are not the same: what
    is written after a kill depends on whether two applies were in one second.
    """

    def __init__(self, step_s: int = 1) -> None:
        self._step = timedelta(seconds=step_s)
        self._now = datetime(2026, 1, 1, tzinfo=UTC)

    def now(self, zone: tzinfo) -> datetime:
        self._now += self._step
        return self._now.astimezone(zone)


class Counter:
    """A hook that lets everything pass and remembers the steps."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def __call__(self, step: Step) -> None:
        self.steps.append(step)


class At:
    """A hook that does something at the n-th step (from 1), once."""

    def __init__(self, number: int, act: Callable[[Step], int | None]) -> None:
        self.left = number
        self._act = act
        self.hit: Step | None = None

    def __call__(self, step: Step) -> int | None:
        self.left -= 1
        if self.left == 0:
            self.hit = step
            return self._act(step)
        return None


def kill(step: Step) -> None:
    """As if somebody had run ``kill -9``."""
    os.kill(os.getpid(), signal.SIGKILL)


def fail(number: int) -> Callable[[Step], None]:
    """Fail a step with an errno, as the kernel would."""

    def act(step: Step) -> None:
        raise OSError(number, os.strerror(number), step.path)

    return act


def shorten(step: Step) -> int | None:
    """Let half of a write through."""
    return step.size // 2 if step.size else None


def in_child(work: Callable[[], None]) -> int:
    """Run ``work`` in a process of its own; returns its wait status.

    0 is success, ``status & 127`` the signal that killed it.
    """
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]
