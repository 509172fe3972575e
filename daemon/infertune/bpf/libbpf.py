# SPDX-License-Identifier: Apache-2.0
"""The functions of libbpf.so.1 that are used, with their types.

The library comes from the distribution (Debian: libbpf1), so it is updated with it.  1.1 is what
Debian 12 has; ``bpf_prog_get_info_by_fd`` came only with 1.2, so the older
``bpf_obj_get_info_by_fd`` is used.  A call releases the interpreter's lock.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, c_bool, c_char_p, c_int, c_size_t, c_uint32, c_uint64, c_void_p

from infertune.base.errors import LibbpfMissing

NAME = "libbpf.so.1"
OLDEST = (1, 1)
INSTALL = "Debian, Ubuntu: apt-get install libbpf1   Fedora: dnf install libbpf   Arch: libbpf"


class OpenOptions(ctypes.Structure):
    """``struct bpf_object_open_opts`` of bpf/libbpf.h; later fields are absent for the library."""

    _fields_ = (
        ("sz", c_size_t),
        ("object_name", c_char_p),
        ("relaxed_maps", c_bool),
        ("pin_root_path", c_char_p),
        ("_attach_prog_fd", c_uint32),
        ("kconfig", c_char_p),
        ("btf_custom_path", c_char_p),
        ("kernel_log_buf", c_void_p),
        ("kernel_log_size", c_size_t),
        ("kernel_log_level", c_uint32),
    )


# name: result, arguments.  Opaque structures are void pointers.
_FUNCTIONS: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "libbpf_major_version": (c_uint32, ()),
    "libbpf_minor_version": (c_uint32, ()),
    "libbpf_num_possible_cpus": (c_int, ()),
    "libbpf_strerror": (c_int, (c_int, c_void_p, c_size_t)),
    "libbpf_set_print": (c_void_p, (c_void_p,)),
    "bpf_object__open_file": (c_void_p, (c_char_p, POINTER(OpenOptions))),
    "bpf_object__load": (c_int, (c_void_p,)),
    "bpf_object__close": (None, (c_void_p,)),
    "bpf_object__btf": (c_void_p, (c_void_p,)),
    "btf__raw_data": (c_void_p, (c_void_p, POINTER(c_uint32))),
    "bpf_object__next_program": (c_void_p, (c_void_p, c_void_p)),
    "bpf_program__name": (c_char_p, (c_void_p,)),
    "bpf_program__set_autoload": (c_int, (c_void_p, c_bool)),
    "bpf_program__attach": (c_void_p, (c_void_p,)),
    "bpf_program__fd": (c_int, (c_void_p,)),
    "bpf_link__fd": (c_int, (c_void_p,)),
    "bpf_link__destroy": (c_int, (c_void_p,)),
    "bpf_iter_create": (c_int, (c_int,)),
    "bpf_object__next_map": (c_void_p, (c_void_p, c_void_p)),
    "bpf_map__name": (c_char_p, (c_void_p,)),
    "bpf_map__fd": (c_int, (c_void_p,)),
    "bpf_map__type": (c_int, (c_void_p,)),
    "bpf_map__key_size": (c_uint32, (c_void_p,)),
    "bpf_map__value_size": (c_uint32, (c_void_p,)),
    "bpf_map__max_entries": (c_uint32, (c_void_p,)),
    "bpf_map__btf_key_type_id": (c_uint32, (c_void_p,)),
    "bpf_map__btf_value_type_id": (c_uint32, (c_void_p,)),
    "bpf_map_lookup_batch": (
        c_int,
        (c_int, c_void_p, c_void_p, c_void_p, c_void_p, POINTER(c_uint32), c_void_p),
    ),
    "bpf_map_get_next_key": (c_int, (c_int, c_void_p, c_void_p)),
    "bpf_map_lookup_elem": (c_int, (c_int, c_void_p, c_void_p)),
    "bpf_map_update_elem": (c_int, (c_int, c_void_p, c_void_p, c_uint64)),
    "bpf_map_delete_elem": (c_int, (c_int, c_void_p)),
    "bpf_obj_get_info_by_fd": (c_int, (c_int, c_void_p, POINTER(c_uint32))),
}


def reason(number: int) -> str:
    """What an errno of libbpf says in words: it has some of its own (libbpf_strerror(3))."""
    text = ctypes.create_string_buffer(256)
    library().libbpf_strerror(number, text, len(text))
    return text.value.decode("utf-8", "replace")


@functools.cache
def library() -> ctypes.CDLL:
    """The library, ready to use.  Raises LibbpfMissing."""
    try:
        found = ctypes.CDLL(NAME, use_errno=True)
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(found, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        # A missing library, or one that lacks a function.
        raise LibbpfMissing(f"{NAME} cannot be used: {error}", hint=INSTALL) from error
    version = (found.libbpf_major_version(), found.libbpf_minor_version())
    if version < OLDEST:
        shown = ".".join(map(str, version))
        raise LibbpfMissing(f"{NAME} is version {shown}, 1.1 or newer is needed", hint=INSTALL)
    # It would write to standard error; what it has to say comes back in errno and the kernel's log.
    found.libbpf_set_print(None)
    return found
