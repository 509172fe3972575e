# SPDX-License-Identifier: Apache-2.0
"""Debian's GRUB itself, started by QEMU's BIOS: it tries options once and drops them.

No kernel: GRUB runs what our /etc/grub.d script prints, shows what an entry would be started
with, and switches off.  Its environment block lies on a disk of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from infertune.boot.loaders import grub_script
from vm.guest import QEMU

WORDS = ("amd_iommu=off", "isolcpus=2-3")
MODULES = "biosdisk ext2 normal configfile loadenv serial terminal test echo halt"
EARLY = """
serial --unit=0 --speed=115200
terminal_output serial
set root=(hd1)
set prefix=(hd1)/boot/grub
configfile /boot/grub/grub.cfg
"""
# Debian's 00_header loads the block first, and its 10_linux copies our variable into the entry.
CONFIG = """load_env
{script}
menuentry one {{
  echo "STARTED[quiet $infertune_options]"
  halt
}}
set timeout=0
"""


class Grub:
    """A machine that has nothing but GRUB."""

    def __init__(self, directory: Path, tools: Path) -> None:
        self.directory = directory
        self._tools = tools / "usr" / "bin"
        modules = tools / "usr" / "lib" / "grub" / "i386-pc"
        boot = directory / "tree" / "boot" / "grub"
        boot.parent.mkdir(parents=True)
        shutil.copytree(modules, boot / "i386-pc")
        script = directory / "01_infertune"
        script.write_text(grub_script(WORDS))
        printed = subprocess.run(["sh", script], capture_output=True, text=True, check=True)
        (boot / "grub.cfg").write_text(CONFIG.format(script=printed.stdout))
        self.tool("grub-script-check", boot / "grub.cfg")
        self._environment = boot / "grubenv"
        self.tool("grub-editenv", self._environment, "create")
        (directory / "early.cfg").write_text(EARLY)
        core = directory / "core"
        self.tool(
            "grub-mkimage", "-d", modules, "-O", "i386-pc", "-p", "(hd1)/boot/grub",
            "-c", directory / "early.cfg", "-o", core, *MODULES.split(),
        )  # fmt: skip
        disk = (modules / "boot.img").read_bytes() + core.read_bytes()
        (directory / "hd0").write_bytes(disk.ljust(2 << 20, b"\0"))

    def tool(self, name: str, *words: str | Path) -> None:
        subprocess.run([self._tools / name, *words], check=True)

    def set(self, value: str) -> None:
        """A new disk whose environment block says so, as grub-editenv would have written it."""
        self.tool("grub-editenv", self._environment, "set", f"infertune_boot={value}")
        disk = self.directory / "hd1"
        disk.unlink(missing_ok=True)
        with disk.open("wb") as file:
            file.truncate(32 << 20)
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        make = ["mke2fs", "-q", "-t", "ext4", "-d", self.directory / "tree", disk]
        subprocess.run(make, env={**os.environ, "PATH": path}, check=True)

    def start(self) -> str:
        """What the entry is started with."""
        drives = [
            word
            for number in (0, 1)
            for word in (
                "-drive",
                f"file={self.directory}/hd{number},format=raw,if=ide,index={number}",
            )
        ]
        serial = self.directory / "serial"
        options = f"-machine pc -accel tcg -m 64 -nodefaults -display none -serial file:{serial}"
        subprocess.run([QEMU, *options.split(), *drives], check=True, timeout=300)
        text = serial.read_text(errors="replace").replace("\r", "")
        return text.partition("STARTED[")[2].partition("]")[0].strip()


@pytest.fixture(scope="module")
def grub(tmp_path_factory: pytest.TempPathFactory) -> Grub:
    directory = tmp_path_factory.mktemp("grub")
    for tool in (QEMU, "apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            pytest.skip(f"not installed: {tool}")
    fetch = ["apt-get", "-qq", "download", "grub-common", "grub-pc-bin"]
    if subprocess.run(fetch, cwd=directory, capture_output=True, check=False).returncode:
        pytest.skip("Debian's GRUB cannot be fetched")
    for package in directory.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", package, directory / "tools"], check=True)
    return Grub(directory / "machine", directory / "tools")


def test_grub_tries_once(grub: Grub) -> None:
    words = " ".join(("quiet", *WORDS))
    grub.set("staged")
    assert [grub.start() for _ in range(3)] == [words, "quiet", "quiet"]
    grub.set("confirmed")
    assert [grub.start() for _ in range(2)] == [words, words]
    grub.set("")
    assert grub.start() == "quiet"
