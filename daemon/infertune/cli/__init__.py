# SPDX-License-Identifier: Apache-2.0
"""The ``infertune`` command: one module per group of verbs, one table of them in main.py."""
