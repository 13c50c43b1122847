"""Debian's packages, for tests in real editors: installed where they are missing and that is allowed."""

import os
import shutil
import subprocess
from pathlib import Path

from filelock import FileLock


def install(*packages: str) -> str:
    """Install packages; why that cannot be, or nothing."""
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        return f"{', '.join(packages)} cannot be installed without apt-get and root"
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with FileLock(Path("/tmp/fimserver-apt.lock")):  # noqa: S108  of root's tests
        for command in (["update"], ["install", "-y", "--no-install-recommends", *packages]):
            done = subprocess.run(["apt-get", "-q", *command], capture_output=True, text=True, env=env, check=False)
    if not done.returncode:
        return ""
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return f"{', '.join(packages)} cannot be had from Debian: {last}"
