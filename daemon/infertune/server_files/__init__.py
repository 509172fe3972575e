# SPDX-License-Identifier: Apache-2.0
"""Files that start model servers: their text in, servers out, and a short text of them again.

Nothing here opens a file.  A snapshot keeps the short text (``redaction.py``); whoever reads the
machine (``host/servers.py``) parses the short text too, so both see the same.
"""
