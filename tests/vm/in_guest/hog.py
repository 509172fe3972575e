# SPDX-License-Identifier: Apache-2.0
"""Runs in a guest: hog.py MIB PAGES SECONDS

Fills MIB of memory block by block and keeps using all of it, until PAGES have gone to swap or the
time is over.
"""

import sys
import time
from pathlib import Path


def swapped_out() -> int:
    fields = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return int(fields["pswpout"])


mib, pages, seconds = map(int, sys.argv[1:])
end, enough = time.monotonic() + seconds, swapped_out() + pages
blocks: list[bytearray] = []
turn = 0
while time.monotonic() < end and swapped_out() < enough:
    if len(blocks) < mib:
        blocks.append(bytearray(b"x") * (1 << 20))
    # Some of the blocks each time, and all of them in the end: what is left alone goes to swap
    # first, and nobody else would feel a pressure.
    step = max(1, len(blocks) // 64)
    turn += 1
    for block in blocks[turn % step :: step]:
        for page in range(0, len(block), 4096):
            block[page] = (block[page] + 1) & 255
