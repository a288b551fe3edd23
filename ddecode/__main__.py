"""`python -m ddecode`, and so `accelerate launch -m ddecode distill ...`."""

import sys

from ddecode.cli import main

if __name__ == "__main__":
    sys.exit(main())
