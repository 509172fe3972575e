# SPDX-License-Identifier: Apache-2.0
"""The one room that reads the machine: a function per kernel file or directory, plain data out."""
