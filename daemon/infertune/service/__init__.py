# SPDX-License-Identifier: Apache-2.0
"""infertuned: the engine on the system bus.  Needs the extra ``daemon`` (dbus-fast)."""
