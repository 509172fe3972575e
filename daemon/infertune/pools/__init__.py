# SPDX-License-Identifier: Apache-2.0
"""How much memory the GPU may hold, what limits it, who holds it, and what the next boot brings.

The one judge of GPU memory: ``facts.py`` takes what :mod:`infertune.host` reads, ``judge.py`` and
``boot.py`` are pure.  Every verb, rule and metric that names a size asks here.
"""
