# SPDX-License-Identifier: Apache-2.0
"""What a profile may say: one entry for each knob, each setting of a launch and of a server."""
