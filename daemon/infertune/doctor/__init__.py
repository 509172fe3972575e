# SPDX-License-Identifier: Apache-2.0
"""The doctor: is this combination of hardware, kernel, firmware, driver and build known to be bad?

Facts are read once (``facts.py``), rules are entries (``rules/``), and ``diagnose.py`` asks each
rule about the facts.  Nothing here changes a machine.
"""
