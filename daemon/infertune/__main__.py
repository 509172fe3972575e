# SPDX-License-Identifier: Apache-2.0
"""``python -m infertune``: the same as the ``infertune`` command."""

import sys

from infertune.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
