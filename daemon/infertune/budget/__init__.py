# SPDX-License-Identifier: Apache-2.0
"""Will a model fit, and how fast can it be: from the head of its file and this machine's facts."""
