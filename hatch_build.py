# SPDX-License-Identifier: Apache-2.0
"""Compiles the probes for the package; ``python hatch_build.py`` does it for a checkout.

Needs clang, llvm-strip and the headers of libbpf, at build time only.  Without clang the package
is built without compiled probes, which it says here and infertune says when they are asked for;
everything else works.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "probes"
TARGET = HERE / "build" / "probes"
INSTALL = (
    "Debian, Ubuntu: apt-get install clang llvm libbpf-dev"
    "   Fedora: dnf install clang llvm libbpf-devel   Arch: pacman -S clang llvm libbpf"
)
# bpfel: every machine infertune runs on is little-endian, so one object fits all of them.
# v3: atomic compare and exchange (Linux 5.12).
FLAGS = ["-target", "bpfel", "-mcpu=v3", "-O2", "-g", "-Wall", "-Wextra", "-Werror"]
FLAGS += ["-Wno-unused-parameter"]  # BPF_PROG declares a context that few programs use


class Missing(Exception):
    """A tool is not installed."""


class ProbesHook(BuildHookInterface[Any]):
    """Puts the compiled probes and their declarations into the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        try:
            objects = build()
        except Missing as missing:
            self.app.display_warning(f"the probes are left out: {missing}\n  {INSTALL}")
            return
        if version != "editable":  # that one finds them in the checkout
            for each in objects:
                build_data["force_include"][str(each)] = f"infertune/probes/{each.name}"


def build() -> list[Path]:
    """Compile what is newer than its object.  Raises Missing, or CalledProcessError."""
    clang, strip = _tool("clang"), _tool("llvm-strip")
    headers = max(path.stat().st_mtime for path in [*SOURCES.glob("*.h"), Path(__file__)])
    TARGET.mkdir(parents=True, exist_ok=True)
    objects = []
    for source in sorted(SOURCES.glob("*.bpf.c")):
        target = TARGET / f"{source.name.removesuffix('.c')}.o"
        if not target.exists() or target.stat().st_mtime < max(source.stat().st_mtime, headers):
            _compile(clang, strip, source, target)
        objects.append(target)
    for old in set(TARGET.glob("*.bpf.o")) - set(objects):
        old.unlink()
    return objects


def _compile(clang: str, strip: str, source: Path, target: Path) -> None:
    new = target.with_suffix(f".{os.getpid()}")
    try:
        done = subprocess.run(
            [clang, *FLAGS, "-c", str(source), "-o", str(new)],
            cwd=HERE,
            capture_output=True,
            text=True,
            check=False,
        )
        if "bpf/bpf_helpers.h' file not found" in done.stderr:
            raise Missing("the headers of libbpf are not installed")
        if done.returncode:
            sys.stderr.write(done.stderr)
            raise subprocess.CalledProcessError(done.returncode, done.args)
        # Debug information is nine tenths of the file; type information stays.
        subprocess.run([strip, "-g", str(new)], check=True)
        new.replace(target)
    finally:
        new.unlink(missing_ok=True)


def _tool(name: str) -> str:
    """The tool, under its own name or with a version as Debian has it (clang-19)."""
    if found := shutil.which(name):
        return found
    versions = [
        (int(match[1]), str(path))
        for directory in os.get_exec_path()
        for path in Path(directory).glob(f"{name}-*")
        if (match := re.fullmatch(rf"{name}-([0-9]+)", path.name))
    ]
    if not versions:
        raise Missing(f"{name} is not installed")
    return max(versions)[1]


if __name__ == "__main__":
    try:
        build()
    except Missing as missing:
        sys.exit(f"the probes were not compiled: {missing}\n  {INSTALL}")
    except subprocess.CalledProcessError:
        sys.exit("the probes were not compiled: see above")
