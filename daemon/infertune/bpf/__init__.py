# SPDX-License-Identifier: Apache-2.0
"""BPF programs through the distribution's libbpf: open, load, attach, read, close.

``libbpf``  the functions of the library, with their types
``object``  one compiled object: its programs, links and maps
``btf``     where the fields of a structure lie
``kernel``  what the running kernel has and allows

Nothing is pinned: when the process ends, however it ends, the kernel takes everything away.
"""
