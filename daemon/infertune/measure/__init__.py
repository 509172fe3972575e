# SPDX-License-Identifier: Apache-2.0
"""Measurements on this machine: what can be said of a change, and what cannot."""
