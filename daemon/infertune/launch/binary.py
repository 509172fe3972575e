# SPDX-License-Identifier: Apache-2.0
"""Which server program is here, and what it says of itself."""

from __future__ import annotations

import glob
import importlib.util
import os
import re
import select
import shutil
import site
import stat
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Literal

from infertune.base.errors import Failed, UsageError
from infertune.base.records import dataclass
from infertune.launch.process import cause, environment

Backend = Literal["rocm", "vulkan", "cpu"]
BACKENDS: tuple[Backend, ...] = ("rocm", "vulkan", "cpu")

_ANSWER_S = 30.0
"""Patience with --version, --help and --list-devices; ROCm takes seconds to start."""

_LONGEST_ANSWER = 1024 * 1024
"""Bytes.  The help of llama-server has 60 KiB."""

_NO_DEVICE = {"HIP_VISIBLE_DEVICES": "-1", "GGML_VK_VISIBLE_DEVICES": ""}
"""ROCm takes seconds to open a device, and neither version nor help depends on one."""

_DEVICE = re.compile(r"^\s+([A-Za-z]+)(\d*): ", re.MULTILINE)
_BACKEND_OF: Mapping[str, Backend] = {"ROCm": "rocm", "HIP": "rocm", "Vulkan": "vulkan"}

_ROCM: Backend = "rocm"
_VULKAN: Backend = "vulkan"
_LIBRARY_MARKS: Mapping[Backend, str] = {"rocm": "hip", "vulkan": "vulkan"}
"""Backend and how its library is called: ``libggml-hip.so``."""

INSTALL_HINT = "install llama.cpp, give --server PATH, or install infertune's extra 'embedded'"


@dataclass(frozen=True, slots=True)
class Server:
    """A server program that speaks llama-server's flags, and its own words about itself."""

    program: tuple[str, ...]
    env: Mapping[str, str]
    """What the program itself needs, beside the profile's variables."""
    version: str | None
    help: str
    devices: tuple[str, ...]
    """Names of its GPUs: ``ROCm0``, ``Vulkan0``."""
    embedded: bool

    @property
    def backends(self) -> tuple[Backend, ...]:
        """Backends with a device here, in the program's order; ``cpu`` is always there."""
        names = (re.sub(r"\d+$", "", device) for device in self.devices)
        found = [_BACKEND_OF[name] for name in names if name in _BACKEND_OF]
        return (*dict.fromkeys(found), "cpu")

    def devices_of(self, backend: Backend) -> tuple[str, ...]:
        return tuple(
            device
            for device in self.devices
            if _BACKEND_OF.get(re.sub(r"\d+$", "", device)) == backend
        )


def find_server(path: str | None, search: str | None) -> str | None:
    """The llama-server to use: ``path`` as given, else the first on ``search`` (PATH), or None."""
    if path is None:
        return shutil.which("llama-server", path=search)
    if not (os.path.isfile(path) and os.access(path, os.X_OK)):
        raise UsageError(f"--server {path}: not a program", hint="give the path of a llama-server")
    return os.path.abspath(path)


def embedded_is_installed() -> bool:
    """Whether the server from the extra ``embedded`` can be started."""
    return importlib.util.find_spec("xllamacpp") is not None


def embedded_program() -> tuple[tuple[str, ...], Mapping[str, str]]:
    """Command and environment of the embedded server (embedded.py), a child like any other."""
    # -P: modules in the current directory must not get into a root process.
    program = (sys.executable, "-P", "-m", "infertune.launch.embedded")
    package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    installed = package in (*site.getsitepackages(), site.getusersitepackages())
    return program, {} if installed else {"PYTHONPATH": package}


def ask_server(
    program: tuple[str, ...], env: Mapping[str, str], caller: Mapping[str, str], *, embedded: bool
) -> Server:
    """Ask a server program what it is and can.

    ``env`` is what the program itself needs.  Raises Failed where it does not
    run or does not know ``--help``; a missing version or device list is only
    unknown.
    """
    surroundings = environment(env, caller)
    # The help first: it needs no device, so it tells a broken program from a broken driver.
    help_text = _ask(program, "--help", surroundings)
    if help_text is None or "--port" not in help_text:
        raise Failed(f"{program[0]} --help does not look like llama-server")
    version = _ask(program, "--version", surroundings)
    devices = None
    if "--list-devices" in help_text:
        devices = _ask(program, "--list-devices", surroundings)
    return Server(
        program=program,
        env=env,
        version=_version(version),
        help=help_text,
        devices=tuple(f"{name}{number}" for name, number in _DEVICE.findall(devices or "")),
        embedded=embedded,
    )


def ask_version(program: str, caller: Mapping[str, str], patience_s: float) -> str | None:
    """What a server program says its version is, without waking a GPU; None where it says nothing.

    Raises Failed where it does not run, dies, or takes longer than ``patience_s``.
    """
    return _version(_ask((program,), "--version", environment(_NO_DEVICE, caller), patience_s))


def ask_help(program: str, caller: Mapping[str, str], patience_s: float) -> str | None:
    """What a server program prints for ``--help``, without waking a GPU; None where it says no.

    Raises Failed where it does not run, dies, or takes longer than ``patience_s``.
    """
    return _ask((program,), "--help", environment(_NO_DEVICE, caller), patience_s)


def others_may_write(path: str) -> bool:
    """Whether somebody but root could have put something else at ``path``.

    Root must not run such a program by itself.  Raises OSError.
    """
    real = os.path.realpath(path)
    while True:
        status = os.stat(real)
        shared = status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX
        if status.st_uid != 0 or shared:
            return True
        if real == "/":
            return False
        real = os.path.dirname(real)


def linked_backends(path: str) -> frozenset[Backend]:
    """The backends a llama-server can load: from the libraries beside it, and its own needs.

    ``cpu`` is always there.  Nothing is run.
    """
    real = os.path.realpath(path)
    here, name = os.path.split(real)
    places = [here, *(os.path.join(os.path.dirname(here), lib) for lib in ("lib", "lib64"))]
    libraries = [each for place in places for each in _listed(place)]
    if here in ("/usr/bin", "/usr/local/bin"):
        # Debian keeps the backends in a directory of ggml's own, one level deeper on some releases.
        for directory in glob.glob("/usr/lib/*-linux-gnu/ggml/") + glob.glob("/usr/lib*/ggml/"):
            libraries += [each for _, _, files in os.walk(directory) for each in files]
    found: set[Backend] = {"cpu"}
    for backend, mark in _LIBRARY_MARKS.items():
        if any(each.startswith(f"libggml-{mark}") for each in libraries):
            found.add(backend)
    with open(os.path.join(here, name), "rb") as file:
        # The names of needed libraries stand near the beginning (.dynstr).
        head = file.read(8 * 1024 * 1024)
    for backend, needed in ((_ROCM, b"libamdhip64.so"), (_VULKAN, b"libvulkan.so")):
        if needed in head:
            found.add(backend)
    return frozenset(found)


def _listed(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


def _ask(
    program: tuple[str, ...], flag: str, env: Mapping[str, str], patience_s: float = _ANSWER_S
) -> str | None:
    """What ``program flag`` prints; None where it says no.

    Raises Failed if it dies, hangs, or prints without end.
    """
    name = os.path.basename(program[-1])
    give_up = time.monotonic() + patience_s
    try:
        with subprocess.Popen(
            [*program, flag],
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as asked:
            assert asked.stdout is not None
            try:
                printed = _read(asked.stdout.fileno(), give_up)
                code = asked.wait(max(0, give_up - time.monotonic()))
            finally:
                asked.kill()
    except (TimeoutError, subprocess.TimeoutExpired):
        raise Failed(f"{name} {flag} gave no answer in {patience_s:g} s") from None
    except BufferError:
        most = _LONGEST_ANSWER // 1024
        raise Failed(f"{name} {flag} prints more than {most} KiB") from None
    except OSError as error:
        raise Failed(f"cannot start {program[0]}: {error.strerror}") from None
    text = printed.decode("utf-8", "replace")
    if code < 0 or code == 127:
        raise Failed(f"{name} {flag}: {cause(code, text.splitlines())}")
    return text if code == 0 else None


def _read(fd: int, give_up: float) -> bytes:
    """What comes until the end.  Raises TimeoutError; BufferError for more than an answer."""
    printed = bytearray()
    while (left := give_up - time.monotonic()) > 0 and select.select([fd], [], [], left)[0]:
        part = os.read(fd, 65536)
        if not part:
            return bytes(printed)
        printed += part
        if len(printed) > _LONGEST_ANSWER:
            raise BufferError
    raise TimeoutError


def _version(text: str | None) -> str | None:
    match = re.search(r"^version: *(.+)$", text or "", re.MULTILINE)
    return match[1].strip() if match else None
