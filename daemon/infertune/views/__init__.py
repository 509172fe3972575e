# SPDX-License-Identifier: Apache-2.0
"""Documents (docs/json.md) as people look at them: one report, one screen.

Pure, but for the application that draws the screen.
"""
