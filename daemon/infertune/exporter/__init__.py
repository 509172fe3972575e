# SPDX-License-Identifier: Apache-2.0
"""infertune-exporter: what the machine and its model servers do, as Prometheus metrics.

It only reads.  It never imports the engine, the service or the command line.
"""
