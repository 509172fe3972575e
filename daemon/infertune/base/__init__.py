# SPDX-License-Identifier: Apache-2.0
"""What everything stands on: files, errors, names, numbers and tables as people write them."""
