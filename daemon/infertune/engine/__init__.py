# SPDX-License-Identifier: Apache-2.0
"""Making the machine what a profile says, and putting everything back."""
