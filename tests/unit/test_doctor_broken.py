# SPDX-License-Identifier: Apache-2.0
"""The doctor on machines whose files are not what they should be: a clear line or "not known"."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from doctor_support import CPUFREQ, GPU, HEALTHY, HWMON, build
from infertune.cli.main import main
from infertune.doctor.surroundings import FILE as SURROUNDINGS

ODD = "/etc/modprobe.d/odd.conf"

Make = Callable[[Path], object]


def text(content: str | bytes) -> Make:
    data = content.encode() if isinstance(content, str) else content
    return lambda path: path.write_bytes(data)


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 30)


def a_socket(path: Path) -> None:
    short = Path("/proc/self/fd") / str(os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY))
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(short / path.name))
    finally:
        os.close(int(short.name))


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def nowhere(path: Path) -> None:
    path.symlink_to("not-there")


def directory(path: Path) -> None:
    path.mkdir()


def fifo(path: Path) -> None:
    os.mkfifo(path)


@dataclass(frozen=True)
class Broken:
    path: str
    make: Make
    rule: str
    """The rule that would have used it."""
    outcome: str
    says: str = ""
    """A part of the line the user gets."""


NO_LINE = "the kernel command line cannot be read"
NO_RELEASE = "the kernel's release cannot be read"
NO_MES = "the driver does not show the MES version"
SILENT = "the snapshot does not say"
FOUND = "modprobe-odd-file", "finding"

BROKEN: dict[str, Broken] = {
    "modprobe-binary": Broken(ODD, text(b"\x7fELF\0\0"), *FOUND, "not a text file"),
    "modprobe-directory": Broken(ODD, directory, *FOUND, "Is a directory"),
    "modprobe-fifo": Broken(ODD, fifo, *FOUND, "not a regular file"),
    "modprobe-socket": Broken(ODD, a_socket, *FOUND, "not a regular file"),
    "modprobe-1-gb": Broken(ODD, sparse, *FOUND, "larger than 1024 KiB"),
    # kmod passes over both.
    "modprobe-loop": Broken(ODD, loop, "modprobe-odd-file", "fine"),
    "modprobe-dangling": Broken(ODD, nowhere, "modprobe-odd-file", "fine"),
    "modprobe-crlf": Broken(
        ODD,
        text("options ttm pages_limit=98304\r\n"),
        "ttm-wrong-unit",
        "finding",
        "is not a number",
    ),
    "modprobe-latin-1": Broken(
        ODD,
        text(b"# gr\xf6\xdfer\noptions ttm pages_limit=98304\n"),
        *("ttm-wrong-unit", "finding", "384 MiB"),
    ),
    "modprobe-word": Broken(
        ODD,
        text("options ttm pages_limit=lots\n"),
        *("ttm-wrong-unit", "finding", "is not a number of pages"),
    ),
    "modprobe-huge-number": Broken(
        ODD,
        text(f"options ttm pages_limit={'9' * 200}\n"),
        *("ttm-wrong-unit", "finding", "is not a number of pages"),
    ),
    "modprobe-continued": Broken(
        ODD, text("options ttm \\\n  pages_limit=98304\n"), "ttm-wrong-unit", "finding", "4 KiB"
    ),
    "modprobe-quoted": Broken(
        ODD, text('options ttm pages_limit="98304"\n'), "ttm-wrong-unit", "finding", "4 KiB"
    ),
    "modprobe-half-a-line": Broken(ODD, text("options ttm"), "ttm-wrong-unit", "fine"),
    "modprobe-long-line": Broken(
        ODD, text("options ttm " + "x" * 60_000 + "\n"), "option-unknown", "fine"
    ),
    "modprobe-escape": Broken(
        ODD, text("options ttm \x1b[31m=1 pages_limit=1\n"), "ttm-wrong-unit", "finding", "4 KiB"
    ),
    "modprobe-not-a-directory": Broken(
        "/usr/lib/modprobe.d", text("x"), "modprobe-odd-file", "fine"
    ),
    "cmdline-latin-1": Broken(
        "/proc/cmdline", text(b"ro gr\xf6\xdfe amd_iommu=pt\n"), "iommu-invalid", "finding", "=pt"
    ),
    "cmdline-directory": Broken("/proc/cmdline", directory, "iommu-invalid", "unknown", NO_LINE),
    "cmdline-fifo": Broken("/proc/cmdline", fifo, "iommu-invalid", "unknown", NO_LINE),
    "cmdline-1-gb": Broken("/proc/cmdline", sparse, "iommu-invalid", "unknown", NO_LINE),
    # Until the end it is one value, as the kernel takes it (next_arg, lib/cmdline.c).
    "cmdline-quote": Broken(
        "/proc/cmdline", text('ro x="open amd_iommu=pt'), "iommu-invalid", "fine"
    ),
    "cmdline-quoted": Broken(
        "/proc/cmdline", text('ro "amd_iommu=pt" x'), "iommu-invalid", "finding", "=pt"
    ),
    "release-word": Broken(
        "/proc/sys/kernel/osrelease", text("banana\n"), "kernel-slow-compute", "unknown", NO_RELEASE
    ),
    "release-digits": Broken(
        "/proc/sys/kernel/osrelease",
        text("9" * 5000),
        *("kernel-slow-compute", "unknown", NO_RELEASE),
    ),
    "release-many": Broken(
        "/proc/sys/kernel/osrelease", text("7.0.12.99999999999"), "kernel-slow-compute", "finding"
    ),
    "mes-word": Broken(
        f"{GPU}/fw_version/mes_fw_version", text("0xZZ"), "firmware-mes-broken", "unknown", NO_MES
    ),
    "mes-directory": Broken(
        f"{GPU}/fw_version/mes_fw_version", directory, "firmware-mes-broken", "unknown", NO_MES
    ),
    "rocm-word": Broken(
        "/opt/rocm/.info/version",
        text("newest\n"),
        *("rocm-slow-prompts", "unknown", "/opt/rocm/.info/version holds no version"),
    ),
    "rocm-loop": Broken(
        "/opt/rocm/.info/version", loop, "rocm-slow-prompts", "unknown", "ROCm is not in /opt/rocm"
    ),
    "dpkg-binary": Broken(
        "/var/lib/dpkg/status", text(b"\0" * 99), "firmware-leftover", "unknown", "binary, not text"
    ),
    "dpkg-fifo": Broken(
        "/var/lib/dpkg/status", fifo, "firmware-leftover", "unknown", "not a regular file"
    ),
    "dpkg-1-gb": Broken(
        "/var/lib/dpkg/status", sparse, "firmware-leftover", "unknown", "larger than 32768 KiB"
    ),
    "dpkg-cut-off": Broken(
        "/var/lib/dpkg/status",
        text("Package: amdgpu-dkms-firmware\nStatus: ins"),
        *("firmware-leftover", "fine"),
    ),
    "log-directory": Broken("/dev/kmsg", directory, "log-mes", "unknown", "is a directory"),
    "log-binary": Broken("/dev/kmsg", text(os.urandom(9999)), "log-mes", "fine"),
    "log-fifo": Broken("/dev/kmsg", fifo, "log-mes", "fine"),
    "log-1-gb": Broken("/dev/kmsg", sparse, "log-mes", "fine"),
    "surroundings-cut-off": Broken(
        SURROUNDINGS, text('{"server": '), "llama-no-gpu", "unknown", SILENT
    ),
    "surroundings-list": Broken(SURROUNDINGS, text("[]"), "llama-no-gpu", "unknown", SILENT),
    "surroundings-types": Broken(
        SURROUNDINGS,
        text('{"environment": [1], "server": 3, "devices": "x"}'),
        *("llama-no-gpu", "unknown", SILENT),
    ),
    "surroundings-deep": Broken(
        SURROUNDINGS, text("[" * 60_000), "llama-no-gpu", "unknown", SILENT
    ),
    "unit-fifo": Broken("/etc/systemd/system/x.service", fifo, "llama-gone-flags", "fine"),
    "unit-open-quote": Broken(
        "/etc/systemd/system/x.service",
        text('[Service]\nExecStart=llama-server "--no-mmap --mlock\n'),
        *("llama-gone-flags", "finding", "passes --mlock"),
    ),
    "declaration-binary": Broken(
        "/etc/infertune/servers.d/x.toml", text(b"\0model = 'x'"), "survey-dynamic-quants", "advice"
    ),
    "limits-word": Broken(
        "/proc/self/limits", text("Max locked memory x y"), "memlock-limit", "fine"
    ),
    "meminfo-word": Broken(
        "/proc/meminfo", text("MemTotal: lots"), "ttm-above-ram", "unknown", "RAM is not known"
    ),
    "pages-limit-word": Broken(
        "/sys/module/ttm/parameters/pages_limit",
        text("lots"),
        *("ttm-above-ram", "unknown", "ttm.pages_limit cannot be read"),
    ),
    "pages-limit-digits": Broken(
        "/sys/module/ttm/parameters/pages_limit",
        text("9" * 400),
        *("ttm-above-ram", "unknown", "ttm.pages_limit cannot be read"),
    ),
    "temperature-digits": Broken(
        f"{HWMON}/temp1_input", text("9" * 400), "gpu-hot", "unknown", "no temperature"
    ),
    "pressure-word": Broken(
        "/proc/pressure/memory", text("full avg300=x"), "memory-stalls", "unknown", "PSI"
    ),
    "buddyinfo-binary": Broken(
        "/proc/buddyinfo", text(os.urandom(99)), "memory-fragmented", "finding", "only 0 B"
    ),
    "start-word": Broken(
        "/proc/stat", text("btime soon\n"), "option-not-in-force", "unknown", "/proc/stat does not"
    ),
    "initramfs-loop": Broken(
        "/boot/initramfs-7.1.3-200.fc44.x86_64.img",
        loop,
        *("initramfs-older", "unknown", "no initramfs of this kernel"),
    ),
    "frequency-zero": Broken(
        f"{CPUFREQ}/policy0/cpuinfo_max_freq", text("0\n"), "cpu-capped", "unknown"
    ),
    "vulkan-not-a-directory": Broken(
        "/usr/share/vulkan/icd.d", text("x"), "vulkan-no-radv", "finding", "RADV is not installed"
    ),
}


def test_there_are_thirty() -> None:
    assert len(BROKEN) >= 30


@pytest.mark.parametrize("name", BROKEN)
def test_broken(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = BROKEN[name]
    root = build(tmp_path, HEALTHY, {broken.path: None})
    where = root.at(broken.path)
    where.parent.mkdir(parents=True, exist_ok=True)
    broken.make(where)
    began = time.monotonic()
    code = main(["--root", str(tmp_path), "doctor", "--json"])
    took = time.monotonic() - began
    out = capsys.readouterr()
    assert out.err == ""
    assert code in (0, 1)
    assert "please report" not in out.out
    document = json.loads(out.out)
    kinds = {
        "finding": {each["id"]: each["text"] for each in document["findings"]},
        "unknown": {each["id"]: each["why"] for each in document["unknown"]},
        "advice": {each["id"]: each["why"] for each in document["survey"]},
        "fine": dict.fromkeys(document["fine"], ""),
    }
    assert broken.rule in kinds[broken.outcome], document
    assert broken.says in kinds[broken.outcome][broken.rule]
    assert took < 60  # a hang, not a speed
    # For people no control character gets through.
    main(["--root", str(tmp_path), "doctor", "--all"])
    assert "\x1b" not in capsys.readouterr().out
