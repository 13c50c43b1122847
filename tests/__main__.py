"""All checks of the project, in one command: ``python -m tests [pytest's arguments]``."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PYTHON = sys.executable
CHECKS = [
    [PYTHON, "-m", "ruff", "check", "."],
    [PYTHON, "-m", "ruff", "format", "--check", "."],
    [PYTHON, "-m", "mypy"],
    [PYTHON, "-m", "pytest", "-n", str(os.cpu_count() or 1), "--dist", "worksteal", "-m", "not editors", *sys.argv[1:]],
    [PYTHON, "-m", "pytest", "-m", "editors", *sys.argv[1:]],  # they type and wait: one after the other
]


def main() -> int:
    """Run every check, also after one failed; 0 when all are good."""
    failed = []
    for command in CHECKS:
        print("$", " ".join(["python", *command[1:]]), flush=True)
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            failed.append("editors" if "editors" in command else command[2])
    print("failed: " + ", ".join(failed) if failed else "all checks are good", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
