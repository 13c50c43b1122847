"""Check the project: ``python -m tests`` for the fast checks, ``python -m tests --all`` for everything.

Further arguments go to pytest, for instance ``python -m tests -k place``. The exit code is 0 if every check is good; a
check that fails does not keep the others from running.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
PYTHON = sys.executable
STATIC = {
    "ruff": [PYTHON, "-m", "ruff", "check", "."],
    "format": [PYTHON, "-m", "ruff", "format", "--check", "."],
    "mypy": [PYTHON, "-m", "mypy"],
    "imports": [PYTHON, "-c", "from importlinter.cli import lint_imports_command as run; run()"],
    "codespell": [PYTHON, "-m", "codespell_lib"],
}
PYTEST = [PYTHON, "-m", "pytest", "--durations=10"]
PARALLEL = ["-n", str(os.cpu_count() or 1), "--dist", "worksteal"]


def main(arguments: list[str]) -> int:
    """Run the checks; return 0 when all are good."""
    checks = dict(STATIC)
    if "--all" in arguments:
        rest = [argument for argument in arguments if argument != "--all"]
        checks["tests"] = [*PYTEST, *PARALLEL, "-m", "not editors", *rest]
        checks["editors"] = [*PYTEST, "-m", "editors", *rest]  # they type and wait: one after the other
    else:
        checks["tests"] = [*PYTEST, *PARALLEL, "-m", "not slow and not editors", *arguments]
    failed, seconds = [], {}
    for name, command in checks.items():
        print("$", " ".join(["python", *command[1:]]), flush=True)
        begin = time.monotonic()
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            failed.append(name)
        seconds[name] = time.monotonic() - begin
    print("seconds: " + ", ".join(f"{name} {s:.0f}" for name, s in seconds.items()), flush=True)
    print("failed: " + ", ".join(failed) if failed else "all checks are good", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
