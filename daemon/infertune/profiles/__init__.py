# SPDX-License-Identifier: Apache-2.0
"""Profiles, which of them the admin made the default, and what one comes to on a machine."""
