# SPDX-License-Identifier: Apache-2.0
"""The images the guests start from, built once and kept, and what it takes on this host.

The image is a Debian system with two kernels (tests/vm/image); those of STACKS are disks that a
boot loader starts (tests/vm/image_efi).  Each is kept in ``$XDG_CACHE_HOME/infertune-lab`` under
a hash of everything it is made from, so an edit there builds a new one; ``rm -r`` of that
directory is always fine.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
LOCK = REPOSITORY / "requirements.lock"
RECIPE = (HERE / "image", HERE / "modules")

KERNELS = ("6.12", "7.x")
PYTHON = "3.13"
"""Version of the guest's Python, for which wheels are fetched."""

EXTRAS = "daemon,exporter,embedded"
"""Of infertune in a guest.  With the embedded one there is a real server and a model, without a
network."""

STACKS = ("grub-efi", "systemd-boot", "uki")
"""Boot loaders of the guests that start themselves (efi.py)."""
EFI_EXTRAS = "daemon"
EFI_RECIPE = (HERE / "image_efi", HERE / "image" / "settings", HERE / "image" / "dependencies")
EFI_PYTHON = {"uki": "3.14"}
"""Version of the guest's Python, where it is another: Debian sid has the newest."""

OPTIONS = ("--extras", EXTRAS, "--python", PYTHON)
"""Of scripts/package, for a wheelhouse that fits a guest."""

UNUSED_DAYS = 14
READY_S = 3 * 3600
"""How long an image with another wheel is kept: each is as large as what a guest has written."""

TO_RUN = ("qemu-system-x86_64", "qemu-img", "ssh", "setpriv")
TO_BUILD = ("mmdebstrap", "apt-get", "apt-config", "dpkg-deb", "mke2fs", "ssh-keygen", "xz")
TO_BUILD_EFI = (*TO_BUILD, "mkfs.vfat", "mcopy", "sfdisk", "dd")


class Unavailable(Exception):
    """The lab cannot be had on this machine, and why."""


def check(stack: str | None = None) -> None:
    """Raise Unavailable unless guests (those of a boot loader) can be started here."""
    if platform.machine() != "x86_64":
        raise Unavailable(f"the guests are x86_64, this machine is {platform.machine()}")
    is_built = image_path(stack).exists()
    to_build = TO_BUILD_EFI if stack else TO_BUILD
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    missing = [
        tool
        for tool in (TO_RUN if is_built else TO_RUN + to_build)
        if shutil.which(tool, path=path) is None
    ]
    if missing:
        raise Unavailable(f"not installed: {', '.join(missing)}")
    if not is_built and os.geteuid() != 0:
        raise Unavailable("the image of the guests is not built yet, which needs root once")


def cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "infertune-lab"


def image_path(stack: str | None = None) -> Path:
    """Where the image of this recipe is, or will be."""
    options = f"{stack} {_options(stack)}" if stack else f"{PYTHON} {EXTRAS}"
    digest = hashlib.sha256(options.encode())
    for path in [*_files(EFI_RECIPE if stack else RECIPE), LOCK]:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    name = f"image-{stack}" if stack else "image"
    return cache() / f"{name}-{digest.hexdigest()[:16]}"


def _files(recipe: tuple[Path, ...]) -> list[Path]:
    return sorted(file for path in recipe for file in (path.iterdir() if path.is_dir() else [path]))


def _options(stack: str | None) -> tuple[str, ...]:
    """Of scripts/package, for the wheelhouse of a guest."""
    if stack is None:
        return OPTIONS
    return ("--extras", EFI_EXTRAS, "--python", EFI_PYTHON.get(stack, PYTHON))


def image(stack: str | None = None) -> Path:
    """Directory of the image, built now if it is not there yet.  Raises Unavailable."""
    check(stack)
    path = image_path(stack)
    with _locked(cache() / "lock"):
        if not path.exists():
            _remove_unused()
            _build(path, stack)
        os.utime(path)
    return path


def ready_image(image: Path, wheel: Path, commands: str, prepare: Callable[[Path], None]) -> Path:
    """What ``prepare`` makes of an image, kept until image, wheel or commands are others."""
    digest = hashlib.sha256(f"{image.name}\n{commands}\n".encode() + wheel.read_bytes())
    name = f"{image.name.rpartition('-')[0]}-ready"
    path = cache() / f"{name}-{digest.hexdigest()[:16]}"
    with _locked(cache() / f"{name}.lock"):
        if not path.exists():
            for old in cache().glob(f"{name}-*"):
                if old.stat().st_mtime < time.time() - READY_S:
                    shutil.rmtree(old)
            with tempfile.TemporaryDirectory(dir=cache(), prefix="build-") as scratch:
                prepare(Path(scratch) / "image")
                (Path(scratch) / "image").rename(path)
        os.utime(path)
    return path


def _build(path: Path, stack: str | None) -> None:
    """Build in a directory beside it, so that half an image is never taken for one."""
    began = time.monotonic()
    recipe = [HERE / "image_efi" / "build", stack] if stack else [HERE / "image" / "build"]
    with tempfile.TemporaryDirectory(dir=cache(), prefix="build-") as scratch:
        target = Path(scratch) / "image"
        target.mkdir()
        _python("scripts/package", "wheelhouse", *_options(stack), "--output", scratch)
        house = Path(scratch) / "wheelhouse"
        for name in ("infertune", "pip"):
            next(house.glob(f"{name}-*.whl")).unlink()
        log = cache() / "build.log"
        with log.open("wb") as output:
            done = subprocess.run(
                [*recipe, target, house],
                env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            )
        end = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
        if done.returncode == os.EX_TEMPFAIL:
            raise Unavailable(f"the packages of the guest cannot be fetched ({log}): {end}")
        assert done.returncode == 0, f"the image could not be built ({log}):\n{end}"
        target.rename(path)
    print(f"guest image built in {time.monotonic() - began:.0f} s: {path}", file=sys.stderr)


def _remove_unused() -> None:
    for old in cache().glob("image-*"):
        if old.stat().st_mtime < time.time() - UNUSED_DAYS * 86400:
            shutil.rmtree(old)


def wheel(directory: Path) -> Path:
    """A fresh wheel of infertune in ``directory``."""
    _python("-m", "hatchling", "build", "-t", "wheel", "-d", str(directory))
    [made] = directory.glob("infertune-*.whl")
    return made


def _python(*words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-B", *words],
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file: two test processes want one image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    # For scripts/test: nothing if guests (``loaders``: of every boot loader) can be started here,
    # else the reason.
    try:
        for each in STACKS if sys.argv[1:] == ["loaders"] else (None,):
            check(each)
    except Unavailable as unavailable:
        sys.exit(str(unavailable))
