"""Run one session: ``python -m tests.session --help``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from session.measure import main

if __name__ == "__main__":
    main()
