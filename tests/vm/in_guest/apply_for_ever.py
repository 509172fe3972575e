# SPDX-License-Identifier: Apache-2.0
"""Runs in a guest: apply, replace and revert without a pause, until the power goes."""

from infertune.cli.main import main

while True:
    for words in ("apply throughput", "apply low-latency", "revert"):
        assert main(words.split()) == 0, words
