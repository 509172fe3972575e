# SPDX-License-Identifier: Apache-2.0
"""Model servers: what is declared, which unit it becomes, and what of it runs.

Daemon, exporter, doctor and command line all know servers through this.
"""
