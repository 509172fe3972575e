# SPDX-License-Identifier: Apache-2.0
"""How words get onto the kernel's command line: one function per boot stack.

Each takes what is there and the words, and answers with a ``Way``; it changes nothing.
"""
