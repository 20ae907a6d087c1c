"""`python -m onnxrank.cli`."""

from __future__ import annotations

import sys

from onnxrank.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
