"""The command line, run as a user types it."""

import os
import subprocess
import sys
from pathlib import Path


def run(
    *arguments: str | Path, stdin: str = "", cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run it; ``env`` changes variables of the environment."""
    command = [sys.executable, "-P", "-m", "fimserver.cli.main", *map(str, arguments)]
    env = {**os.environ, **(env or {})}
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, cwd=cwd, env=env, timeout=120, check=False
    )
