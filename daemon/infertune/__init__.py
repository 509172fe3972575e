# SPDX-License-Identifier: Apache-2.0
"""infertune: tune a Linux machine for local LLM inference, and put everything back."""

__version__ = "0.2.0"
