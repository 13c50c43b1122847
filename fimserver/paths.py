"""Where fimserver keeps files of its own: the system's folders, or all under ``FIMSERVER_HOME``.

Knows:  the environment, platformdirs.  Never: what the files hold.
"""

import os
import warnings
from pathlib import Path

HOME_VARIABLE = "FIMSERVER_HOME"


def config_file() -> Path:
    """The person's settings; there need not be one."""
    return config_folder() / "config.toml"


def config_folder() -> Path:
    """What a person writes."""
    return _folder("config")


def data_folder() -> Path:
    """What is worth keeping."""
    return _folder("data")


def state_folder() -> Path:
    """What is kept from one run to the next, logs among it."""
    return _folder("state")


def cache_folder() -> Path:
    """What can be made again."""
    return _folder("cache")


def runtime_folder() -> Path:
    """Sockets and locks of what runs now."""
    return _folder("runtime")


def _folder(kind: str) -> Path:
    if home := os.environ.get(HOME_VARIABLE):
        return Path(home).expanduser().absolute() / kind
    import platformdirs  # noqa: PLC0415  only who asks for a folder pays for it

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a session without XDG_RUNTIME_DIR gets a folder elsewhere, which is well
        folder: Path = getattr(platformdirs.PlatformDirs("fimserver", appauthor=False), f"user_{kind}_path")
    return folder
