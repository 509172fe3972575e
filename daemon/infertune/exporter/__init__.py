# SPDX-License-Identifier: Apache-2.0
"""Metrics of this machine for Prometheus."""
