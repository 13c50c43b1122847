"""Run the soak: ``python -m tests.soak --help``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from soak.command import main

if __name__ == "__main__":
    main()
