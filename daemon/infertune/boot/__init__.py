# SPDX-License-Identifier: Apache-2.0
"""Settings that take effect at the next boot: planned, staged, tried once, kept or put back."""
