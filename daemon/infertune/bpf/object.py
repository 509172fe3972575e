# SPDX-License-Identifier: Apache-2.0
"""One compiled BPF object: its programs, their links, and its maps."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from infertune.base.errors import (
    BpfError,
    CapabilityMissing,
    FieldMissing,
    LoadRejected,
    LockedDown,
    ObjectMissing,
    TracepointMissing,
)
from infertune.base.records import dataclass
from infertune.base.root import Root
from infertune.bpf import kernel
from infertune.bpf.btf import Layout, Types
from infertune.bpf.libbpf import OpenOptions, library, reason

PER_CPU_TYPES = {5, 6, 10, 21}
"""Per-CPU hash, array, LRU hash and cgroup storage (enum bpf_map_type of linux/bpf.h)."""

# linux/bpf.h, struct bpf_prog_info: fields are only ever added at its end.
_RUN_TIME, _INFO_SIZE = 192, 216
_LOG_SIZE = 256 * 1024
_LOG_LINES = 8
_BATCH = 256
# libbpf writes this into the kernel's log where a field was not found.
_NO_SUCH_FIELD = "invalid CO-RE relocation"


@dataclass(frozen=True, slots=True)
class RunStatistics:
    """What the kernel measured of one program, while kernel.bpf_stats_enabled was 1."""

    run_time_ns: int
    runs: int
    missed: int
    """Runs that the kernel left out because the program was running on that CPU already."""


class Object:
    """Programs and maps of one file.  Use it in a ``with`` or close it.

    Raises ObjectMissing if the file is not there or not an object, LibbpfMissing.
    """

    def __init__(self, path: Path, *, btf: bytes | None = None, root: Root | None = None) -> None:
        self._lib = library()
        self._root = root or Root()
        self._path = path
        self._links: dict[str, int] = {}
        self._log = ctypes.create_string_buffer(_LOG_SIZE)
        self._btf = _in_memory(btf) if btf is not None else None
        self._handle: int | None = None
        options = OpenOptions(sz=ctypes.sizeof(OpenOptions))
        options.kernel_log_buf = ctypes.addressof(self._log)
        options.kernel_log_size = _LOG_SIZE
        if self._btf is not None:
            options.btf_custom_path = f"/proc/self/fd/{self._btf}".encode()
        ctypes.set_errno(0)
        self._handle = self._lib.bpf_object__open_file(os.fsencode(path), ctypes.byref(options))
        if not self._handle:
            number = ctypes.get_errno()
            self.close()
            raise ObjectMissing(f"{path}: {reason(number)}")
        next_program = self._lib.bpf_object__next_program
        self._programs = {
            self._lib.bpf_program__name(each).decode(): each
            for each in _all(next_program, self._handle)
        }
        self._maps = {
            self._lib.bpf_map__name(each).decode(): _Map(self._lib, each)
            for each in _all(self._lib.bpf_object__next_map, self._handle)
        }
        self._types = self._own_types()

    def __enter__(self) -> Object:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def programs(self) -> tuple[str, ...]:
        """Names of all programs in the file."""
        return tuple(self._programs)

    @property
    def maps(self) -> tuple[str, ...]:
        """Names of all maps in the file."""
        return tuple(self._maps)

    def layout(self, name: str) -> tuple[Layout, Layout]:
        """How key and value of a map are made up."""
        each = self._maps[name]
        return self._types.layout(each.key_type), self._types.layout(each.value_type)

    def load(self, programs: Collection[str] | None = None) -> None:
        """Hand these programs (None: all) and the maps to the kernel, which checks them.

        Raises CapabilityMissing, LockedDown, FieldMissing or LoadRejected.
        """
        assert self._handle
        for name, program in self._programs.items():
            self._lib.bpf_program__set_autoload(program, programs is None or name in programs)
        code = self._lib.bpf_object__load(self._handle)
        self._forget_btf()
        if code < 0:
            raise self._why(-code, self._path.name)

    def attach(self, name: str) -> None:
        """Let a program run whenever what its section names happens.

        Raises TracepointMissing, CapabilityMissing, LockedDown or LoadRejected.
        """
        ctypes.set_errno(0)
        link = self._lib.bpf_program__attach(self._programs[name])
        if not link:
            raise self._why(ctypes.get_errno(), name)
        self._links[name] = link

    def detach(self, name: str) -> None:
        """The opposite of ``attach``."""
        self._lib.bpf_link__destroy(self._links.pop(name))

    def visit(self, name: str) -> None:
        """Run an attached iterator over everything it visits.  Raises OSError."""
        ctypes.set_errno(0)
        fd = self._lib.bpf_iter_create(self._lib.bpf_link__fd(self._links[name]))
        if fd < 0:
            raise OSError(-fd, os.strerror(-fd), name)
        try:
            while True:
                with contextlib.suppress(InterruptedError, BlockingIOError):
                    if not os.read(fd, 4096):
                        return
        finally:
            os.close(fd)

    def entries(self, name: str) -> list[tuple[bytes, bytes]]:
        """Every key of a map with its values on all possible CPUs, one after the other."""
        return self._maps[name].entries()

    def forget(self, name: str, key: bytes) -> None:
        """Remove a key from a map; one that is gone is fine."""
        self._lib.bpf_map_delete_elem(self._maps[name].fd, key)

    def capacity(self, name: str) -> int:
        """How many keys a map can hold."""
        return self._maps[name].max_entries

    def statistics(self, name: str) -> RunStatistics | None:
        """What a loaded program has cost; None where the kernel does not tell."""
        data = ctypes.create_string_buffer(_INFO_SIZE)
        size = ctypes.c_uint32(_INFO_SIZE)
        fd = self._lib.bpf_program__fd(self._programs[name])
        if self._lib.bpf_obj_get_info_by_fd(fd, data, ctypes.byref(size)) < 0:
            return None
        if size.value < _INFO_SIZE:  # before Linux 5.12, which counts what was missed
            return None
        return RunStatistics(*(ctypes.c_uint64 * 3).from_buffer(data, _RUN_TIME))

    def close(self) -> None:
        """Detach everything and give it back to the kernel."""
        for name in list(self._links):
            self.detach(name)
        self._forget_btf()
        if self._handle:
            self._lib.bpf_object__close(self._handle)
            self._handle = None

    # -- inside ----------------------------------------------------------------

    def _own_types(self) -> Types:
        size = ctypes.c_uint32()
        own = self._lib.bpf_object__btf(self._handle)
        data = self._lib.btf__raw_data(own, ctypes.byref(size)) if own else None
        if not data:
            self.close()
            raise ObjectMissing(f"{self._path}: it was compiled without type information (-g)")
        return Types(ctypes.string_at(data, size.value))

    def _forget_btf(self) -> None:
        if self._btf is not None:
            os.close(self._btf)
            self._btf = None

    def _why(self, number: int, what: str) -> BpfError:
        """The error for an errno that libbpf or the kernel gave."""
        log = self._log.value.decode("utf-8", "replace")
        if _NO_SUCH_FIELD in log:
            return FieldMissing(f"{what}: a field that it reads is not in this kernel")
        if number in (errno.ENOENT, errno.ESRCH):
            return TracepointMissing(f"{what}: this kernel has no such tracepoint")
        if number in (errno.EPERM, errno.EACCES) and not log:
            lacking = kernel.missing_capabilities(self._root)
            if lacking:
                return CapabilityMissing(
                    f"{what}: {' and '.join(lacking)} missing",
                    hint="run it as root, or give the service these capabilities",
                )
            if kernel.locked_down(self._root):
                return LockedDown(
                    f"{what}: kernel lockdown is in the mode 'confidentiality'",
                    hint="the mode 'integrity' allows it (kernel_lockdown(7))",
                )
        text = f"{what}: {reason(number)}"
        if log:
            text += ": " + " | ".join(log.strip().splitlines()[-_LOG_LINES:])
        return LoadRejected(text)


class _Map:
    def __init__(self, lib: ctypes.CDLL, handle: int) -> None:
        self._lib = lib
        self._handle = handle
        self.key_size: int = lib.bpf_map__key_size(handle)
        self.key_type: int = lib.bpf_map__btf_key_type_id(handle)
        self.value_type: int = lib.bpf_map__btf_value_type_id(handle)
        self.max_entries: int = lib.bpf_map__max_entries(handle)
        size: int = lib.bpf_map__value_size(handle)
        per_cpu = lib.bpf_map__type(handle) in PER_CPU_TYPES
        self.values: int = lib.libbpf_num_possible_cpus() if per_cpu else 1
        # The kernel rounds a per-CPU value up to eight bytes.
        self.value_size = (size + 7) // 8 * 8 if per_cpu else size

    @property
    def fd(self) -> int:
        return int(self._lib.bpf_map__fd(self._handle))

    def entries(self) -> list[tuple[bytes, bytes]]:
        found = self._in_batches()
        return found if found is not None else list(self._one_by_one())

    def _in_batches(self) -> list[tuple[bytes, bytes]] | None:
        """Many keys with one call (Linux 5.6); None where this map or kernel cannot."""
        whole = self.value_size * self.values
        batch = min(self.max_entries, _BATCH)
        found: list[tuple[bytes, bytes]] = []
        here: Any = None
        while True:
            keys = ctypes.create_string_buffer(self.key_size * batch)
            values = ctypes.create_string_buffer(whole * batch)
            count = ctypes.c_uint32(batch)
            # Where it goes on: at least as long as a key, and four bytes for a hash.
            there = ctypes.create_string_buffer(max(self.key_size, 8))
            code = self._lib.bpf_map_lookup_batch(
                self.fd, here, there, keys, values, ctypes.byref(count), None
            )
            if code < 0 and code != -errno.ENOENT:
                # ENOSPC: more keys in one bucket of a hash than a batch holds.
                return None
            found += self._unpacked(keys.raw, values.raw, count.value)
            if code < 0:
                return found
            here = there

    def _unpacked(self, keys: bytes, values: bytes, count: int) -> Iterator[tuple[bytes, bytes]]:
        """The entries of a batch."""
        whole = self.value_size * self.values
        for index in range(count):
            key = keys[index * self.key_size : (index + 1) * self.key_size]
            yield key, values[index * whole : (index + 1) * whole]

    def _one_by_one(self) -> Iterator[tuple[bytes, bytes]]:
        here: Any = None
        there = ctypes.create_string_buffer(self.key_size)
        value = ctypes.create_string_buffer(self.value_size * self.values)
        # The kernel starts again at the first key when `here` was removed in the meantime.
        for _ in range(self.max_entries * 2):
            if self._lib.bpf_map_get_next_key(self.fd, here, there) < 0:
                return
            if self._lib.bpf_map_lookup_elem(self.fd, there, value) == 0:
                yield there.raw, value.raw
            here = ctypes.create_string_buffer(there.raw, self.key_size)


def _all(function: Any, handle: int) -> Iterator[int]:
    """What an iterating function of libbpf finds."""
    each = function(handle, None)
    while each:
        yield each
        each = function(handle, each)


def _in_memory(data: bytes) -> int:
    """A descriptor of a file without a name that holds ``data``."""
    fd = os.memfd_create("btf")
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]
    return fd
