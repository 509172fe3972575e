# SPDX-License-Identifier: Apache-2.0
"""Runs in a guest: hog.py MIB SECONDS: fill memory block by block and keep using all of it."""

import sys
import time

mib, seconds = map(int, sys.argv[1:])
end = time.monotonic() + seconds
blocks: list[bytearray] = []
while time.monotonic() < end:
    if len(blocks) < mib:
        blocks.append(bytearray(b"x") * (1 << 20))
    for block in blocks[:: max(1, len(blocks) // 64)]:
        for page in range(0, len(block), 4096):
            block[page] = (block[page] + 1) & 255
