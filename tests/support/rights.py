"""Run as a user without rights, also in CI, which runs as root."""

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def without_rights() -> Iterator[None]:
    """Access checks use the real user id; the effective one stays as it is."""
    if not hasattr(os, "setreuid") or os.geteuid() != 0:
        yield
        return
    os.setreuid(65534, 0)
    try:
        yield
    finally:
        os.setreuid(0, 0)


@contextlib.contextmanager
def as_another_user() -> Iterator[None]:
    """Open files as a user without rights does; nothing changes for a user who is not root."""
    if not hasattr(os, "seteuid") or os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
