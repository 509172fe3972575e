# SPDX-License-Identifier: Apache-2.0
"""What is measured of a model server on this machine, and what may be said of it."""
